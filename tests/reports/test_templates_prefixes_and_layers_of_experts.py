"""Templates that ask otherwise than they teach, tokenizers with a prefix of their own, linears that
PEFT takes for experts, and what two machines print."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from sparse_lora_dist.adapter.peft_agrees import dropped_by_peft
from sparse_lora_dist.base_model.safetensors_writer import SafetensorsWriter, header_room
from sparse_lora_dist.checkpoint import Progress
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.data.chat import encode_prompt, encode_text
from sparse_lora_dist.data.fields import find_template
from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.training import summary
from tests.fixtures.data_files import assistant, jsonl, load, user
from tests.fixtures.tiny_models import EVEN_SIZES
from tests.fixtures.tiny_tokenizer import MARKED, PLAIN, byte_tokenizer


@pytest.mark.parametrize("content", [{"chat_template": MARKED}, {"model_max_length": 9}, [MARKED]])
def test_a_file_of_json_is_no_template(tmp_path: Path, content: object) -> None:
    file = tmp_path / "chat_template.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is a JSON file.*chat_template into a file of its own"):
        find_template(byte_tokenizer(), str(file))
    (tmp_path / "a.jinja").write_text(MARKED)
    assert find_template(byte_tokenizer(), str(tmp_path / "a.jinja")) == MARKED


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(
    ("asks", "differs"),
    [("<|assistant|>", False), ("<|assistant|><think>\n", True), ("<|bot|>", True)],
)
def test_a_model_that_is_asked_otherwise_than_it_learned(
    tmp_path: Path, asks: str, differs: bool, train_on: Any
) -> None:
    template = MARKED.replace(
        "{% if add_generation_prompt %}<|assistant|>",
        "{% if add_generation_prompt %}" + asks.replace("\n", "{{ '\\n' }}"),
    )
    file = jsonl(tmp_path / "a.jsonl", [{"messages": [user("what"), assistant("it")]}])
    notes = load(file, byte_tokenizer(template=template), train_on=train_on).reading.notes
    said = [note for note in notes if "asks for an answer with" in note]
    assert bool(said) == differs
    if differs:
        assert repr(asks.replace("<|assistant|>", "")[-8:])[1:-1] in said[0]


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(
    ("after", "between"), [("<|assistant|>", ""), ("", "<|assistant|>"), ("<|assistant|>", "\\n")]
)
def test_a_model_that_is_asked_with_the_beginning_of_what_stands_before_answers(
    tmp_path: Path, after: str, between: str, train_on: Any
) -> None:
    """Only with marks is what follows the asking not learned."""
    template = MARKED.replace("prompt %}<|assistant|>", "prompt %}" + after)
    if between == "\\n":
        template = template.replace("{% generation", "{{ '\\n' }}{% generation")
    file = jsonl(tmp_path / "a.jsonl", [{"messages": [user("what"), assistant("it")]}])
    notes = load(file, byte_tokenizer(template=template), train_on=train_on).reading.notes
    said = [note for note in notes if "asks for an answer with" in note]
    assert len(said) == (between != "" and train_on == "response")
    if said:
        assert f"in training '{between}' is not learned, which stands after it" in said[0]


def with_frame(before: list[str], after: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    inner = tokenizer.backend_tokenizer
    special = [(token, inner.token_to_id(token)) for token in {*before, *after}]
    inner.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize(
    ("before", "after", "bos"),
    [
        (["<|user|>", "<|system|>"], [], None),  # GLM-4: [gMASK] <sop>
        (["<|user|>"], ["<|end|>"], "<s>"),  # BERT: [CLS] and [SEP], beside another eos
        (["<s>"], ["</s>"], "<s>"),
        ([], [], "<s>"),
    ],
)
def test_texts_have_the_special_tokens_of_their_tokenizer(
    before: list[str], after: list[str], bos: str | None
) -> None:
    tokenizer = with_frame(before, after)
    tokenizer.bos_token = bos
    eos = tokenizer.eos_token_id
    wanted = tokenizer("book").input_ids
    wanted += [] if wanted[-1] == eos else [eos]
    assert encode_text(tokenizer, "book") == wanted
    again = tokenizer.decode(wanted)  # a text that has them is not given them twice
    assert encode_text(tokenizer, again) == wanted
    start = [tokenizer.convert_tokens_to_ids(token) for token in before]
    prompt = encode_prompt(tokenizer, [user("bo")], template=None)
    assert prompt == start + tokenizer("bo", add_special_tokens=False).input_ids


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32, "mlp_only_layers": []},
    "mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_linears_whose_lora_peft_drops(kind: str) -> None:
    sizes = EVEN_SIZES | {"num_hidden_layers": 2, "vocab_size": 64} | ARCHITECTURES[kind]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    said = dropped_by_peft(model, linears)
    adapted = get_peft_model(model, LoraConfig(target_modules=linears))
    has = {name.partition("base_model.model.")[2] for name, _ in adapted.named_modules()}
    lost = [name for name in linears if f"{name}.lora_A" not in has]
    assert said == sorted({name.rpartition(".")[2] for name in lost})
    assert bool(said) == (kind == "qwen3_moe")


def test_a_small_file_has_a_small_header(tmp_path: Path) -> None:
    names = [f"layers.{i}.weight" for i in range(30)]
    out = SafetensorsWriter(tmp_path, header_room(names))
    for name in names:
        out.add_tensor(name, torch.ones(1))
    out.finish()
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size < 30 * 200


@pytest.mark.parametrize("launcher", ["environment", "deepspeed"])
def test_a_run_on_two_machines_goes_on_with_its_own_launcher(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed: Any = SimpleNamespace(total_steps=4, program="launcher/train.py")
    of_two = SimpleNamespace(launcher=launcher, local_size=2, world_size=3)
    monkeypatch.setattr(summary, "this_launch", lambda: of_two)
    said = summary.next_command(Config(), feed, Progress(step=2))
    assert said.startswith("the same launcher and program with --config")


def test_this_machine_is_named_where_it_is_the_only_one() -> None:
    feed: Any = SimpleNamespace(total_steps=4, program="launcher/train.py")
    assert isinstance(summary.this_launch(), Launch)
    assert "--num_gpus 1" in summary.next_command(Config(), feed, Progress(step=2))


def test_the_plain_template_is_asked_as_it_learned(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"messages": [user("what"), assistant("it")]}])
    assert not load(file, byte_tokenizer(template=PLAIN)).reading.notes


@pytest.mark.parametrize("is_own", [True, False])
def test_a_broken_template_is_no_fault_of_the_data(tmp_path: Path, is_own: bool) -> None:
    broken = PLAIN.replace("{% endfor %}", "")
    (tmp_path / "a.jinja").write_text(broken)
    given = None if is_own else str(tmp_path / "a.jinja")
    tokenizer = byte_tokenizer(template=broken if is_own else PLAIN)
    place = "tokenizer's chat template" if is_own else r"--chat_template .*a\.jinja"
    with pytest.raises(UserError, match=rf"{place} is broken in line \d: .*Correct the template"):
        find_template(tokenizer, given)
    refuses = "{{ raise_exception('no') }}"  # maybe this chat only
    assert find_template(tokenizer, refuses) == refuses


def test_marks_that_cover_nothing_are_named(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"messages": [user("what"), assistant("it")]}])
    template = MARKED.replace("m.role == 'assistant'", "m.role == 'bot'")
    with pytest.raises(UserError, match="marks of the chat template cover nothing: put them"):
        load(file, byte_tokenizer(template=template))
