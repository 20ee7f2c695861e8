"""Help texts: every option of every program can be read alone, and a number names its range."""

import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from sparse_lora_dist.config.schema import TRAIN, Program, build_parser, known_options
from sparse_lora_dist.editing.edit_options import PROGRAM as EDIT
from sparse_lora_dist.evaluation.eval_options import PROGRAM as EVAL
from sparse_lora_dist.export.export_options import ExportConfig
from sparse_lora_dist.export.export_options import build_parser as export_parser
from sparse_lora_dist.plan.plan_options import PROGRAM as PLAN
from sparse_lora_dist.report.report_options import build_parser as report_parser
from sparse_lora_dist.show.show_options import build_parser as show_parser

PROGRAMS = (TRAIN, PLAN, EVAL, EDIT)
RANGE = re.compile(
    r"(\bin [\[(]|\b(at least|at most|above|below|must divide)\b|\bfrom \d|\d, or \d)"
    r"|\b(steps?|tokens?|bytes|bits|GB|TFLOP/s|[Nn]umber of|[Ff]raction|probability)\b"
)
DURATIONS = {"collective_timeout", "time_limit", "signal_lead"}


def helps_of(program: Program) -> dict[str, str]:
    return {a.dest: a.help or "" for a in build_parser(program)._actions}


def own_texts() -> Iterator[tuple[str, str, Any]]:
    """(option, help, type) of every option that belongs to no method."""
    for program in PROGRAMS:
        helps = helps_of(program)
        for name, option in known_options(program).items():
            if option.method is None:
                yield name, helps[name], option.hint
    for parser in (export_parser(), report_parser(), show_parser()):
        hints = get_type_hints(ExportConfig) if parser.prog.endswith("export.py") else {}
        for action in parser._actions:
            if action.dest != "help":
                yield action.dest, action.help or "", hints.get(action.dest, str)


def method_texts() -> list[tuple[str, str, Any]]:
    helps = helps_of(TRAIN)
    options = known_options().items()
    return [(name, helps[name], option.hint) for name, option in options if option.method]


def faults(name: str, text: str, hint: Any) -> list[str]:
    """What is wrong with a help text, by the rules that hold for all of them."""
    found = []
    if not re.match(r"[A-Z]", text):
        found.append("does not start with a capital letter")
    if re.match(r"(The same|Likewise|It|Its|They|Their|Of|May|Do|Does|Is|Are|Which|How)\b", text):
        found.append("does not start with a noun or an imperative")
    if "likewise" in text.lower() or "the same in" in text.lower():
        found.append("needs its neighbours")
    if not text.endswith("."):
        found.append("does not end with a full stop")
    number = {int, float} & {hint, *get_args(hint)}
    if (number or name in DURATIONS) and not RANGE.search(text):
        found.append("names neither unit nor allowed values")
    return [f"{name} {fault}: {text!r}" for fault in found]


def test_help_texts_can_be_read_alone() -> None:
    texts = list(own_texts())
    assert len({name for name, _, _ in texts}) > 90
    assert [fault for text in texts for fault in faults(*text)] == []


@pytest.mark.parametrize(
    "text", ["The same in its second.", "what it is.", "How many.", "Of the run.", "Weight of it."]
)
def test_a_bad_help_text_is_found(text: str) -> None:
    assert faults("toy", text, float)
