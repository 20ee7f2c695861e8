"""Options without effect are refused, and what belongs to another run or program stays."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_lora_dist import programs
from sparse_lora_dist.config.paths import with_commas
from sparse_lora_dist.editing import edit_options
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.evaluation import eval_options
from sparse_lora_dist.run_folder.metrics_file import JsonLines
from sparse_lora_dist.runtime.entry_point import wrong_interpreter
from sparse_lora_dist.system.imports import large_imports
from sparse_lora_dist.system.whole_folders import finish, new_folder

TEXT = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--init_adapter A", "To evaluate an adapter, use --adapter"),
        ("--max_samples 1", "To evaluate a part of the data, use --limit"),
        ("--rank 8", "--rank has no effect in launcher/eval.py. Leave it out"),
        ("--dropout=0.1", "--dropout has no effect in launcher/eval.py"),
        ("--resume auto", "--resume has no effect in launcher/eval.py"),
        ("--output_dir x", "--output_dir has no effect in launcher/eval.py"),
        ("--data default", "--data has no effect in launcher/eval.py. Use --eval_data"),
        ("--packing true", "--packing has no effect in launcher/eval.py"),
    ],
)
def test_eval_refuses_what_only_training_uses(tmp_path: Path, words: str, said: str) -> None:
    (tmp_path / "e.jsonl").write_text(TEXT)
    with pytest.raises(ConfigError) as caught:
        eval_options.load_request(["--eval_data", str(tmp_path / "e.jsonl"), *words.split()])
    assert said in str(caught.value)


def test_eval_takes_the_options_of_a_run_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(TEXT)
    (tmp_path / "run.yaml").write_text(f"rank: 8\neval_data: {tmp_path}/e.jsonl\n")
    asked = eval_options.load_request(["--config", str(tmp_path / "run.yaml")])
    assert asked.config.adapter.rank == 8


@pytest.mark.parametrize("words", ["--max_samples 1", "--chat_template t", "--eval_every 5"])
def test_edit_refuses_what_edits_do_not_use(tmp_path: Path, words: str) -> None:
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(ConfigError, match=f"{words.split()[0]} has no effect in launcher/edit.py"):
        edit_options.load_request(["--edits", str(tmp_path / "e.json"), *words.split()])


def test_a_copy_made_of_hard_links_leaves_the_records_of_the_first(tmp_path: Path) -> None:
    """cp -al, as backups do."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "copy").mkdir()
    os.link(tmp_path / "run/metrics.jsonl", tmp_path / "copy/metrics.jsonl")
    JsonLines(tmp_path / "copy/metrics.jsonl", last_step=1).append({"step": 2})
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "copy/metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def written(final: Path, text: str) -> Path:
    temporary = new_folder(final)
    (temporary / "README.md").write_text(text)
    return temporary


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_of_two_exports_at_once_the_first_stays(tmp_path: Path, empty: bool) -> None:
    final = tmp_path / "out"
    if empty:
        final.mkdir()
    first, second = written(final, "first"), written(final, "second")
    finish(first, final, replaces=False)
    with pytest.raises(OSError, match="out"):
        finish(second, final, replaces=False)
    assert (final / "README.md").read_text() == "first"
    finish(written(final, "third"), final)
    assert (final / "README.md").read_text() == "third"


def test_names_with_commas_are_told_from_several_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rank=2,seed=0", "b"):
        os.mkdir(name)
    assert with_commas(["base", "rank=2", "seed=0", " b"]) == ("base", "rank=2,seed=0", "b")
    assert with_commas(["rank=2", "seed=1"]) == ("rank=2", "seed=1")


def test_a_library_that_refuses_a_variable_is_one_sentence() -> None:
    with pytest.raises(UserError, match="cannot be imported: ValueError: DS_ACCELERATOR must be"):
        with large_imports():
            raise ValueError("DS_ACCELERATOR must be one of ...")
    with pytest.raises(UserError, match=r"^mine$"), large_imports():
        raise UserError("mine")
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):  # any program
        programs._reader("not_here", "read")([])


def test_a_python_in_which_the_libraries_do_not_run_is_refused() -> None:
    plain = SimpleNamespace(optimize=1)
    assert wrong_interpreter(plain, "UTF-8") is None
    assert wrong_interpreter(plain, "latin-1") is None
    assert "PYTHONOPTIMIZE=2" in str(wrong_interpreter(SimpleNamespace(optimize=2), "UTF-8"))
    assert "PYTHONUTF8=1" in str(wrong_interpreter(plain, "ANSI_X3.4-1968"))
