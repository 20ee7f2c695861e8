"""Pages of docs/methods: they are what the script writes, and their examples run."""

import re
import runpy
import shlex
from math import isfinite
from pathlib import Path

import pytest

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "methods"
PROGRAM = ["deepspeed", "launcher/train.py"]


def example(name: str) -> dict[str, str]:
    """Options of the example command on the committed page of a method."""
    text = re.findall(r"```\n(.*?)```", (FOLDER / f"{name}.md").read_text(), re.DOTALL)[-1]
    words = shlex.split(text.replace("\\\n", ""))
    assert words[:2] == PROGRAM
    return dict(zip((w.removeprefix("--") for w in words[2::2]), words[3::2], strict=True))


def test_the_committed_pages_are_those_that_the_script_writes() -> None:
    """Mended by ``python docs/generate_methods.py``."""
    written = runpy.run_path(str(ROOT / "docs" / "generate_methods.py"))["pages"]()
    assert {p.name for p in FOLDER.iterdir()} == written.keys()
    for file, text in written.items():
        assert (FOLDER / file).read_text() == text, file


@pytest.mark.parametrize("name", METHODS)
def test_an_example_has_options_that_the_program_takes(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for k, v in example(name).items() for word in (f"--{k}", v)]
    assert load_config(words).adapter.method == name


@pytest.mark.parametrize("name", METHODS)
def test_an_example_runs_on_a_tiny_model(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    options = example(name)
    del options["output_dir"]
    ranks(1, "tests.work.run:train", flags=tiny.flags(tmp_path, **options))
    losses = [row["loss"] for row in read_records(tmp_path / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 6 and all(map(isfinite, losses))


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_has_a_help_text_that_stands_alone(name: str) -> None:
    for _, default, text in re.findall(
        r"^\| `--(\w+)` \| .*? \| (\S+) \| (.*) \|$", (FOLDER / f"{name}.md").read_text(), re.M
    ):
        assert text[0].isupper() and text.endswith(".")
        assert text.split()[0] not in ("The", "It", "Its", "Of", "How", "What", "Which")
        assert default not in ("null", "empty") or f"{default}:" in text.lower()
