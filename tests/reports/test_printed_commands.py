"""Commands that the programs print can be pasted into a shell, whatever the folder is called."""

import re
import shlex
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_lora_dist.checkpoint import Progress
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.editing.edit_options import NOT_FOR_EDITS
from sparse_lora_dist.editing.edit_options import PROGRAM as EDIT
from sparse_lora_dist.plan import check
from sparse_lora_dist.training import summary

ODD = ["runs/a b", "runs/it's", "runs/$(touch x)", 'runs/"q"', "runs/a;b&c", "runs/ä*"]
FEED: Any = SimpleNamespace(total_steps=4, program="launcher/train.py")


def in_folder(folder: str) -> Config:
    return Config(run=replace(Config().run, output_dir=folder))


@pytest.mark.parametrize("folder", ODD)
def test_the_command_that_goes_on(folder: str) -> None:
    words = shlex.split(summary.next_command(in_folder(folder), FEED, Progress(step=2)))
    assert words[words.index("--config") + 1] == f"{folder}/run.yaml"
    assert words[-2:] == ["--resume", "auto"]


def test_a_usual_folder_needs_no_quotes() -> None:
    line = summary.next_command(in_folder("runs/default"), FEED, Progress(step=2))
    assert line.endswith("--config runs/default/run.yaml --resume auto")


@pytest.mark.parametrize("folder", ODD)
@pytest.mark.parametrize(("is_lora", "label"), [(True, "go on"), (False, "model")])
def test_the_commands_of_the_summary(
    folder: str, is_lora: bool, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: dict[str, str] = {}
    monkeypatch.setattr(summary, "print_line", lambda name, text="": lines.update({name: text}))
    adapter = SimpleNamespace(form=SimpleNamespace(to_lora=is_lora or None))
    model: Any = SimpleNamespace(adapters=[adapter], dropped_by_peft=[], taken_by_peft=[])
    summary.print_summary(
        in_folder(folder),
        FEED,
        Progress(step=4),
        [],
        model=model,
        adapter_bytes=1,
        goes_on=False,
    )
    words = shlex.split(lines[label])
    assert (f"{folder}/adapter" if is_lora else f"{folder}/merged") in words
    assert f"{folder}/tensorboard" in shlex.split(lines["curves"])


def test_a_loss_that_could_not_be_written_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last loss in the file was shown, of an older step."""
    lines: dict[str, str] = {}
    monkeypatch.setattr(summary, "print_line", lambda name, text="": lines.update({name: text}))
    model: Any = SimpleNamespace(adapters=[], dropped_by_peft=[], taken_by_peft=[])
    summary.print_summary(
        in_folder("run"), FEED, Progress(step=4), None, model=model, adapter_bytes=0, goes_on=False
    )
    assert "could not be written to the end" in lines["result"] and "live" not in lines


def test_the_summary_of_edits_names_options_that_edit_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: dict[str, str] = {}
    monkeypatch.setattr(summary, "print_line", lambda name, text="": lines.update({name: text}))
    adapter = SimpleNamespace(form=SimpleNamespace(to_lora=True))
    model: Any = SimpleNamespace(adapters=[adapter], dropped_by_peft=[], taken_by_peft=["a.head"])
    program = f"{EDIT.name} --edits facts.json"
    summary.print_summary(
        in_folder("runs/edit"),
        SimpleNamespace(total_steps=4, program=program),  # type: ignore[arg-type]
        Progress(step=4),
        [],
        model=model,
        adapter_bytes=1,
        goes_on=False,
    )
    assert "PEFT does not open" in lines["adapter"]
    # Options of launcher/export.py, in whose command they stand, are left out.
    said = re.sub(r"\(launcher/export.py .*?\)", "", lines["go on"])
    named = re.findall(r"--(\w+)", said)
    assert named and not {*named} & {*NOT_FOR_EDITS, *EDIT.ignored}


@pytest.mark.parametrize("folder", ODD)
def test_the_command_of_the_memory_plan(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    model: Any = SimpleNamespace(module=None, sites=[], full={}, whole=frozenset())
    need: Any = SimpleNamespace(fits=lambda limits: True)
    monkeypatch.setattr(check, "print_line", lambda name, text="": lines.append(text))
    monkeypatch.setattr(check, "need_of", lambda *a: need)
    monkeypatch.setattr(check, "need_text", lambda *a: "fits")
    monkeypatch.setattr(check, "modules_inside", lambda full: {})
    monkeypatch.setattr(check.PlannedEngine, "of", classmethod(lambda cls, e: None))
    check.say_whether_it_fits(in_folder(folder), model, {})
    words = shlex.split(lines[0].split("(plan: ")[1].removesuffix(")"))
    assert words[words.index("--config") + 1] == f"{folder}/run.yaml"
