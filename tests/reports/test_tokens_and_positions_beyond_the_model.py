"""Token ids without a row in the embedding, and rows longer than the positions.

Reports: meta-llama/llama-cookbook#189, hiyouga/LlamaFactory#1206 (a pad or added token beyond the
embedding); huggingface/transformers#6559, EleutherAI/gpt-neo#273 (longer rows than positions).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import look_at
from sparse_lora_dist.training.fits import check_ids, check_positions
from tests.conftest import Ranks
from tests.fixtures.families import config_of, rope
from tests.fixtures.tiny_run import TinyRun


class Opened:
    """As much of a ``Model`` as the checks ask."""

    def __init__(self, family: str, task: str = "causal_lm", **options: Any) -> None:
        self.module = meta_model(
            config_of(family, **options),
            task=task,
            dtype=torch.bfloat16,
            attn_implementation=None,
            trust_remote_code=False,
        )
        self.look = look_at(self.module, task)


@pytest.mark.parametrize(
    ("family", "table"),
    [
        ("opt", "model.decoder.embed_positions"),
        ("gpt_neo", "transformer.wpe"),
        ("gpt_bigcode", "transformer.wpe"),
        ("biogpt", "biogpt.embed_positions"),
        ("bart", "model.decoder.embed_positions"),
        ("gptj", "max_position_embeddings"),
        ("ctrl", "max_position_embeddings"),
        ("mpt", "max_seq_len"),
    ],
)
def test_a_row_longer_than_a_table_of_any_name_is_refused(family: str, table: str) -> None:
    model: Any = Opened(family)
    check_positions(model, 128, "--data")
    with pytest.raises(UserError) as caught:
        check_positions(model, 129, "--data")
    assert str(caught.value) == (
        f"In --data the longest row has 129 tokens, but the model has only 128 positions ({table})"
        ". Set --sequence_length to 128 or less."
    )


@pytest.mark.parametrize(
    ("new_tokens", "advice"),
    [
        (100, "The longest prompt has 29 tokens: set --max_new_tokens to 99 or less."),
        (1, "The longest prompt has 128 tokens: leave out questions that are so long."),
    ],
)
def test_an_answer_longer_than_a_table_names_what_makes_it_shorter(
    new_tokens: int, advice: str
) -> None:
    model: Any = Opened("gptj")
    with pytest.raises(UserError) as caught:
        check_positions(model, 129, "--eval_data with --max_new_tokens", new_tokens=new_tokens)
    assert str(caught.value).endswith(advice)


def test_a_table_that_does_not_restart_must_hold_the_padding_too() -> None:
    model: Any = Opened("bart", max_position_embeddings=130)
    check_positions(model, 129, "--data", padded=130)
    with pytest.raises(UserError, match="has 129 tokens.* 130 positions .*takes 136"):
        check_positions(model, 129, "--data", padded=136)


@pytest.mark.parametrize(
    ("family", "options", "notes"),
    [
        ("llama", {}, 1),
        ("llama", rope("dynamic"), 0),
        ("gemma3_text", {}, 1),
        ("bloom", {}, 0),
        ("mamba2", {}, 0),
    ],
)
def test_rotary_positions_go_on_with_a_note_unless_they_are_scaled(
    family: str, options: dict[str, Any], notes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    model: Any = Opened(family, **options)
    check_positions(model, 128, "--data")
    assert capfd.readouterr().out == ""
    check_positions(model, 129, "--data")
    said = " ".join(capfd.readouterr().out.split())
    assert said.count("in --data the longest document has 129 tokens, but the model") == notes


def damaged(tiny: TinyRun, folder: Path, change: Callable[[Path], None]) -> TinyRun:
    shutil.copytree(tiny.model, folder / "model")
    change(folder / "model")
    return replace(tiny, model=folder / "model")


def with_tokens(model: Path) -> None:
    """Tokens that a chat template needs are added, and the model is not resized."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer.save_pretrained(model)


def with_a_pad_token(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    with_config(model, None)


def with_padding_beyond(model: Path) -> None:
    with_config(model, json.loads((model / "config.json").read_text())["vocab_size"])


def with_config(model: Path, pad: int | None) -> None:
    file = model / "config.json"
    about = json.loads(file.read_text()) | {"pad_token_id": pad}
    file.write_text(json.dumps(about))


def test_the_first_example_with_an_unknown_token_is_named(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    own = damaged(tiny, tmp_path, with_tokens)
    said = ranks(1, "tests.work.run:refusal", flags=own.flags(tmp_path / "run"))[0]
    rows = json.loads((own.model / "config.json").read_text())["vocab_size"]
    assert f"has the token '<|im_end|>' with the id {rows + 1}" in said
    assert f"but the model's embedding has only {rows} rows" in said
    assert "In --data" in said and "example 1 ('<|im_start|>" in said
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.parametrize("change", [with_a_pad_token, with_padding_beyond])
def test_padding_beyond_the_embedding_changes_nothing(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    losses = []
    for own in (tiny, damaged(tiny, tmp_path, change)):
        folder = tmp_path / f"run{len(losses)}"
        ranks(1, "tests.work.run:train", flags=own.flags(folder, max_steps=2))
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([record.get("loss") for record in records])
    assert losses[0] == losses[1]


def test_prompts_of_an_evaluation_are_looked_at_too(tiny: TinyRun, tmp_path: Path) -> None:
    own = damaged(tiny, tmp_path, with_tokens)
    tokenizer = AutoTokenizer.from_pretrained(own.model)
    model: Any = Opened("llama", vocab_size=len(tokenizer) - 2)
    ids = tokenizer("the cat <|im_start|>").input_ids
    check_ids(model, tokenizer, [tokenizer("the cat").input_ids], "--edits")
    with pytest.raises(UserError, match="In --edits, example 2 .*has the token '<|im_start|>'"):
        check_ids(model, tokenizer, [tokenizer("the cat").input_ids, ids], "--edits")
