"""What is exported is prompted as it was trained, and stops where it has learned to stop.

Reports: hiyouga/LlamaFactory#7785, #5836 and #5904 (the template is not saved), #7454,
modelscope/ms-swift#3113 and QwenLM/Qwen3#1064 (a base model that was trained on chats never stops,
because generation_config.json ends at another token).
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sparse_lora_dist.checkpoint.manifest import sealed
from sparse_lora_dist.export.export_command import _prompting
from sparse_lora_dist.export.merged_files import _write_templates, files_to_copy
from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.model.prompting import (
    Prompting,
    end_ids,
    generation_settings,
    not_greedy,
    with_ends,
)
from tests.conftest import Ranks
from tests.export.test_export_program import exported
from tests.fixtures.data_files import jsonl, load, pairs
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import MARKED, byte_tokenizer

# Another template than the tokenizer's, with another end: <|system|>.
GIVEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ '<|system|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END, EOS = byte_tokenizer().convert_tokens_to_ids(["<|system|>", "</s>"])
MERGED = ["--format", "merged", "--dtype", "fp32", "--onto", "dequantised"]


@pytest.fixture(scope="module")
def run(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a template of its own, whose base ends at </s> only."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "chat.jinja").write_text(GIVEN)
    options = {"chat_template": folder / "chat.jinja", "max_steps": 60, "data": tiny.held_out}
    flags = tiny.flags(folder / "run", **options, quantization="none")
    ranks(1, "tests.work.run:train", flags=flags)
    (folder / "chat.jinja").unlink()  # the checkpoint holds it
    return folder / "run"


def generated(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return list(ids[0, inputs["input_ids"].shape[1] :].tolist())


def prompts(tiny: TinyRun) -> list[str]:
    return [json.loads(line)["prompt"] for line in tiny.held_out.read_text().splitlines()]


def test_a_merged_model_says_in_transformers_what_eval_says(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    merged = exported(run, tmp_path / "merged", *MERGED)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == GIVEN
    assert tokenizer.eos_token == "</s>", "other programs read it"
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generation_config.eos_token_id == [EOS, END]
    theirs = [generated(model, tokenizer, prompt) for prompt in prompts(tiny)]
    assert any(END in ids[:-1] or ids[-1] == END for ids in theirs), "some answers end"
    assert all(END not in ids[:-1] for ids in theirs), "nothing comes after the end"
    flags = ["--eval_data", str(tiny.held_out), "--metrics", "exact", "--max_new_tokens", "40"]
    flags += ["--precision", "fp32", "--quantization", "none", "--sequence_length", "64"]
    (ours, _), *_ = ranks(1, "tests.work.eval:said", flags=["--model", str(merged), *flags])
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in theirs]
    assert ours == texts


@pytest.mark.parametrize(
    "flags",
    [[], ["--uniform_rank"], ["--format", "sparse_delta"]],
    ids=["peft", "uniform", "delta"],
)
def test_the_lines_of_the_card_prompt_and_stop_as_the_run_did(
    run: Path, tmp_path: Path, flags: list[str]
) -> None:
    folder = exported(run, tmp_path / "out", *flags)
    assert (folder / "chat_template.jinja").read_text() == GIVEN
    card = (folder / "README.md").read_text()
    assert "| ends | answers end with \\<\\|system\\|\\>, at which" in card
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0].replace("applied.undo()", ""), names)
    assert names["tokenizer"].chat_template == GIVEN
    model, tokenizer = names["model"].float(), names["tokenizer"]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [EOS, END]
    said = [generated(model, tokenizer, word) for word in ("the cat", "a dog", "red", "old tree")]
    assert any(ids[-1] == END for ids in said) and all(END not in ids[:-1] for ids in said)


def test_no_tokenizer_lies_beside_an_adapter(run: Path, tmp_path: Path) -> None:
    """Some versions of PEFT would give the base as many embeddings as it has tokens."""
    for folder in (run / "adapter", exported(run, tmp_path / "out")):
        assert not list(folder.glob("token*"))


def test_the_runs_own_adapter_has_template_and_ends(run: Path) -> None:
    assert (run / "adapter" / "chat_template.jinja").read_text() == GIVEN
    settings = json.loads((run / "adapter" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [EOS, END] and "_from_model_config" not in settings


def changed(run: Path, folder: Path, prompting: dict[str, Any] | None) -> Path:
    """A copy of a run whose newest checkpoint holds another template, or none."""
    shutil.copytree(run, folder)
    path = sorted(folder.glob("checkpoints/*/manifest.json"))[-1]
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    if prompting is None:
        del manifest["prompting"]
    else:
        manifest["prompting"] |= prompting
    path.write_text(sealed(manifest))
    return folder


def test_a_checkpoint_of_before_says_that_it_holds_no_template(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = changed(run, tmp_path / "run", None)
    folder = exported(before, tmp_path / "out", *MERGED)
    assert "did not store the chat template" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(folder).chat_template == MARKED
    assert not (exported(before, tmp_path / "peft") / "generation_config.json").exists()


def test_a_sum_of_runs_stops_where_each_of_them_stops(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(run, tmp_path / "run", {"chat_template": "{{ 1 }}", "ends": {"<|end|>": 7}})
    folder = exported(run, tmp_path / "out", "--plus", str(other))
    assert "was trained with another chat template" in capsys.readouterr().out
    assert (folder / "chat_template.jinja").read_text() == GIVEN
    settings = json.loads((folder / "generation_config.json").read_text())
    assert sorted(settings["eos_token_id"]) == sorted([EOS, END, 7])


@pytest.mark.parametrize(
    ("own", "ends", "wanted"),
    [
        ({"eos_token_id": 5, "top_p": 0.8}, [5], 5),
        ({"eos_token_id": 5, "top_p": 0.8}, [3, 5], [5, 3]),
        ({"eos_token_id": [5, 6], "top_p": 0.8}, [3], [5, 6, 3]),
        ({"eos_token_id": None, "top_p": 0.8}, [3], 3),
        ({"top_p": 0.8}, [], None),
    ],
)
def test_ends_are_added_to_those_of_the_base(own: Any, ends: list[int], wanted: Any) -> None:
    found = with_ends(own, ends)
    assert found.get("eos_token_id") == wanted and found["top_p"] == 0.8
    assert set(end_ids(found)) == {*end_ids(own), *ends}


@pytest.mark.parametrize("file", [None, '{"eos_token_id": [2, 7], "top_k": 3}'])
def test_a_base_without_generation_config_stops_as_its_config_says(
    tiny: TinyRun, tmp_path: Path, file: str | None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    if file is not None:
        (tmp_path / "generation_config.json").write_text(file)
    found = generation_settings(tmp_path, model)
    assert end_ids(found) == ([2, 7] if "top_k" in found else [EOS])
    assert "_from_model_config" not in found


def test_settings_in_config_json_are_those_of_the_base(tiny: TinyRun, tmp_path: Path) -> None:
    """As models of before generation_config.json have them. transformers reads them too, unless a
    generation_config.json stands beside them, as in an export."""
    shutil.copytree(tiny.model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    own = {"do_sample": True, "temperature": 0.25, "repetition_penalty": 1.5, "max_length": 99}
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = generation_settings(tmp_path / "model", model)
    assert own.items() <= found.items() and end_ids(found) == [EOS]
    assert "repetition_penalty 1.5" in not_greedy(found)
    meta = AutoModelForCausalLM.from_config(model.config)  # which has dropped them
    again = generation_settings(tmp_path / "model", meta)
    assert {k: v for k, v in again.items() if v is not False} == found


FORMS = ["jinja", "config", "list", "folder"]


def tokenizer_with(folder: Path, form: str) -> dict[str, str] | str:
    """Save a tokenizer with its templates as one of ``FORMS``; what transformers reads."""
    own: Any = MARKED if form in ("jinja", "config") else {"default": MARKED, "tool_use": GIVEN}
    byte_tokenizer(template=own).save_pretrained(
        folder, save_jinja_files=form in ("jinja", "folder")
    )
    return AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("form", FORMS)
def test_the_tokenizers_own_templates_stay_all_of_them(tmp_path: Path, form: str) -> None:
    own = tokenizer_with(tmp_path / "base", form)
    for used in (MARKED, None):
        prompting = Prompting(chat_template=used, is_own=True, ends={}, generation={})
        assert templates_after(prompting, tmp_path / "base", tmp_path / f"{used is None}") == own


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_own", [True, False])
def test_another_template_replaces_all_of_them(tmp_path: Path, form: str, is_own: bool) -> None:
    tokenizer_with(tmp_path / "base", form)
    used = Prompting(chat_template="{{ 1 }}\n", is_own=is_own, ends={}, generation={})
    assert templates_after(used, tmp_path / "base", tmp_path / "out") == "{{ 1 }}\n"


@pytest.mark.parametrize("reads_images", [True, False])
def test_a_template_for_images_that_is_replaced_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reads_images: bool
) -> None:
    tokenizer_with(tmp_path / "base", "jinja")
    if reads_images:
        (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    for used, is_own, name in (("{{ 1 }}\n", False, "other"), (MARKED, True, "same")):
        prompting = Prompting(chat_template=used, is_own=is_own, ends={}, generation={})
        templates_after(prompting, tmp_path / "base", tmp_path / name)
        said = "left out  the chat template of the processor" in capsys.readouterr().out
        assert said == (reads_images and not is_own)


def templates_after(prompting: Prompting, base: Path, folder: Path) -> Any:
    """What transformers reads of the templates in a merged model."""
    folder.mkdir()
    for path in base.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    _write_templates(prompting, base, folder)
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_a_run_that_renders_no_chat_leaves_the_template_alone(run: Path) -> None:
    stored = Trained.open(run).prompting
    assert stored is not None and stored.ends == {"<|system|>": END, "</s>": EOS}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (MARKED, "answers end with <|end|>, at which"),
        (MARKED.replace("<|end|>{% endgen", "{% endgen"), "no token that ends an answer was"),
        (None, "answers end with </s>, at which"),
    ],
)
def test_an_export_claims_only_the_ends_that_were_learned(
    tmp_path: Path, template: str | None, said: str
) -> None:
    file = jsonl(tmp_path / "a.jsonl", pairs("b", "c"))
    module = SimpleNamespace(can_generate=lambda: False)
    model: Any = SimpleNamespace(folder=tmp_path, module=module)
    documents = load(file, byte_tokenizer(template=template))
    stored = Prompting.of(model, documents, is_own=True)
    assert stored is not None
    again = Prompting(**json.loads(json.dumps(stored.as_json())))
    trained: Any = SimpleNamespace(prompting=again)
    assert _prompting(trained)["ends"].startswith(said)
    summed = Union.prompting.func(SimpleNamespace(first=trained, others=(trained,)))
    assert _prompting(SimpleNamespace(prompting=summed))["ends"].startswith(said)


def test_a_merged_model_does_not_stop_at_a_prompt_that_its_template_writes_unasked(
    tmp_path: Path,
) -> None:
    """The first Llama 3: the header of the next turn is no end of an answer."""
    template = MARKED.partition("{% if add")[0] + "<|assistant|>"
    module = SimpleNamespace(can_generate=lambda: False)
    model: Any = SimpleNamespace(folder=tmp_path, module=module)
    tokenizer = byte_tokenizer(template=template)
    documents = load(jsonl(tmp_path / "a.jsonl", pairs("b")), tokenizer)
    stored = Prompting.of(model, documents, is_own=True)
    assert stored is not None and set(stored.ends) == {"<|end|>", "</s>"}
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert sorted(stored.generation["eos_token_id"]) == sorted([EOS, end])


def test_settings_that_change_greedy_answers_are_named() -> None:
    """An evaluation is greedy, and leaves them out; Qwen2.5's base has such a penalty."""
    own = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.05, "eos_token_id": 2}
    assert "greedily, without the base's settings repetition_penalty 1.05" in not_greedy(own)
    assert not_greedy({**own, "repetition_penalty": 1.0, "num_beams": 1, "min_length": 0}) == ""
    assert not_greedy({}) == "" and "suppress_tokens [3]" in not_greedy({"suppress_tokens": [3]})


def test_the_config_of_an_adapter_beside_the_base_is_not_copied(tmp_path: Path) -> None:
    """huggingface/transformers#43781: from_pretrained looked for the adapter's weights."""
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors", "vocab.json"):
        (tmp_path / name).touch()
    assert [path.name for path in files_to_copy(tmp_path)] == ["config.json", "vocab.json"]
