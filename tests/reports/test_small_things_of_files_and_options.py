"""What hostile and unlucky input did that was wrong without a word, or ended a finished run."""

import json
import math
from pathlib import Path

import pytest

from sparse_lora_dist import checkpoint
from sparse_lora_dist.checkpoint.manifest import MANIFEST, step_of
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.paths import moved_run, where_it_goes_on
from sparse_lora_dist.data.fields import find_fields, find_template
from sparse_lora_dist.data.reading import template_source
from sparse_lora_dist.editing.edit_file import read_edits
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.evaluation.eval_options import bad_output
from sparse_lora_dist.evaluation.results import _exponential, as_text
from sparse_lora_dist.training.summary import gain
from tests.fixtures.data_files import load
from tests.fixtures.tiny_tokenizer import PLAIN, byte_tokenizer

RUN_STEPS = ("step_00000001", "step_00000003", "step_99999999", "step_100000000")


def test_a_copy_of_a_checkpoint_under_a_short_name_is_no_checkpoint_of_the_run(
    tmp_path: Path,
) -> None:
    for name in (*RUN_STEPS, "step_1", "step_2", "step_000000002", "step_٣٣٣٣٣٣٣٣", "step_4_old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    assert [path.name for path in checkpoint.published(tmp_path)] == list(RUN_STEPS)
    assert step_of(tmp_path / "step_1") is None and step_of(tmp_path / "step_00000001") == 1


def test_a_moved_run_is_found_where_the_shell_leaves_the_home_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = [("config", ["~/b/run.yaml"]), ("resume", ["auto"])]  # --config=~/b/run.yaml in bash
    found = moved_run(flags, {"resume": "auto", "output_dir": str(tmp_path / "a")})
    assert found == str(tmp_path / "b")


@pytest.mark.parametrize("began", ["b", "runs/b", "./runs/b/", "../runs/b", "."])
def test_a_run_whose_folder_is_relative_has_not_moved(tmp_path: Path, began: str) -> None:
    said = where_it_goes_on(began, str(tmp_path / "runs" / "b"))
    assert "moved" not in said
    assert f"goes on in {tmp_path}/runs/b: its output_dir {began} is relative" in said


@pytest.mark.parametrize("began", ["a", "runs/a", "other/b", "/runs/b"])
def test_a_run_of_another_name_has_moved(tmp_path: Path, began: str) -> None:
    folder = str(tmp_path / "runs" / "b")
    assert (
        where_it_goes_on(began, folder) == f"the run of {began} was moved, and goes on in {folder}"
    )


def test_a_template_of_a_windows_editor_and_one_with_braces_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x{{y}}.jinja"
    path.write_text(PLAIN, encoding="utf-8-sig")
    assert find_template(byte_tokenizer(), str(path)) == PLAIN
    assert template_source(str(path), PLAIN, None) == str(path)
    assert find_template(byte_tokenizer(), PLAIN) == PLAIN


def test_a_text_file_of_a_windows_editor(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("once", encoding="utf-8-sig")
    tokenizer = byte_tokenizer()
    (document,) = load(path, tokenizer)
    assert tokenizer.decode(document.input_ids).startswith("once")


def test_one_column_for_prompts_and_responses_is_refused() -> None:
    with pytest.raises(UserError, match="are both a. Name the two columns"):
        find_fields(
            ["a", "b"], text_field="text", prompt_field="a", response_field="a", place="--data x"
        )


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ('"subject": "a\\ud800"', "surrogates not allowed"),
        ('"unread": "\\ud800"', "surrogates not allowed"),
        ('"subject": "a", "subject": "b"', "has the key 'subject' several times"),
    ],
)
def test_an_edit_that_is_no_text_or_says_two_things_is_refused_when_read(
    tmp_path: Path, field: str, why: str
) -> None:
    path = tmp_path / "edits.json"
    path.write_text('[{"prompt": "p", "target_new": "t", ' + field + "}]")
    with pytest.raises(UserError, match=why):
        read_edits(path)


@pytest.mark.parametrize("loss", [709.0, 710.0, 1e9])
def test_a_loss_whose_perplexity_is_no_number_is_still_reported(loss: float) -> None:
    number = {"value": loss, "low": loss - 1, "high": loss + 1, "examples": 3}
    perplexity = _exponential(number)
    assert perplexity["value"] == (math.exp(709.0) if loss == 709.0 else None)
    json.dumps(perplexity, allow_nan=False)
    measures = {"loss": number, "perplexity": perplexity}
    text = as_text({"results": [{"adapter": "a", "measures": measures}], "differences": []})
    assert "infinity" in text


@pytest.mark.parametrize(
    ("first", "text"),
    [
        (0.0, "0.0000 -> 2.0000 nats per token"),
        (10**400, "training loss was not finite in 1 of its 2 records: lower --learning_rate"),
        (math.nan, "training loss was not finite in 1 of its 2 records: lower --learning_rate"),
    ],
)
def test_a_strange_first_loss_does_not_end_a_run_that_is_done(first: float, text: str) -> None:
    said = gain([{"step": 1, "loss": first}, {"step": 2, "loss": 2.0}], "token")
    assert text in said and "%" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output_dir", "null"], "--output_dir must be text, got 'null'"),
        (["----rank", "4"], "----rank is not an option; did you mean --rank"),
    ],
)
def test_a_word_that_only_looks_like_an_option_or_value_is_refused(
    words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(words)
    assert said in str(caught.value)


@pytest.mark.parametrize("option", [["--num_epochs", "1e20"], ["--max_steps", "2000000000"]])
def test_a_run_without_end_is_refused(option: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{option[0]} must be at most 1000000000"):
        load_config(option)


def test_eval_replaces_no_file_that_it_has_not_written(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "a", "response": "b"}\n')
    assert "is no file that --answers has written" in bad_output("answers", mine, overwrite=True)[0]
    assert "is no file that --output has written" in bad_output("output", mine, overwrite=True)[0]
    (tmp_path / "answers.jsonl").write_text('{"adapter": "base", "measure": "loss"}\n{"a')
    (tmp_path / "results.json").write_text('{"results": [], "differences": []}')
    assert bad_output("answers", tmp_path / "answers.jsonl", overwrite=True) == []
    assert bad_output("output", tmp_path / "results.json", overwrite=True) == []
    assert bad_output("output", tmp_path / "new.json", overwrite=False) == []
