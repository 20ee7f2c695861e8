"""Help: every text can be read alone and a number names its range; what each page lists."""

import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from sparse_lora_dist.config.arguments import ACTIONS
from sparse_lora_dist.config.help_pages import common_page, help_page
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.schema import TRAIN, Program, help_texts, known_options
from sparse_lora_dist.editing.edit_options import PROGRAM as EDIT
from sparse_lora_dist.errors import ConfigError
from sparse_lora_dist.evaluation.eval_options import PROGRAM as EVAL
from sparse_lora_dist.export.export_options import ExportConfig
from sparse_lora_dist.export.export_options import build_parser as export_parser
from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.plan.plan_options import PROGRAM as PLAN
from sparse_lora_dist.report.report_options import build_parser as report_parser
from sparse_lora_dist.show.show_options import build_parser as show_parser

PROGRAMS = (TRAIN, PLAN, EVAL, EDIT)
RANGE = re.compile(
    r"(\bin [\[(]|\b(at least|at most|above|below|must divide)\b|\bfrom \d|\d, or \d)"
    r"|\b(steps?|tokens?|bytes|bits|GB|TFLOP/s|[Nn]umber of|[Ff]raction|probability)\b"
)
DURATIONS = {"collective_timeout", "time_limit", "signal_lead"}


def own_texts() -> Iterator[tuple[str, str, Any]]:
    """(option, help, type) of every option that belongs to no method."""
    yield from ((name, text, str) for name, text in ACTIONS.items())
    for program in PROGRAMS:
        helps = help_texts(program)
        for name, option in known_options(program).items():
            if option.method is None:
                yield name, helps[name], option.hint
    for parser in (export_parser(), report_parser(), show_parser()):
        hints = get_type_hints(ExportConfig) if parser.prog.endswith("export.py") else {}
        for action in parser._actions:
            if action.dest != "help":
                yield action.dest, action.help or "", hints.get(action.dest, str)


def method_texts() -> list[tuple[str, str, Any]]:
    helps = help_texts()
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


def test_help_texts_of_methods_can_be_read_alone() -> None:
    texts = method_texts()
    assert len(texts) > 70
    assert [fault for text in texts for fault in faults(*text)] == []


@pytest.mark.parametrize(
    "text", ["The same in its second.", "what it is.", "How many.", "Of the run.", "Weight of it."]
)
def test_a_bad_help_text_is_found(text: str) -> None:
    assert faults("toy", text, float)


# Pages


def listed(page: str) -> list[str]:
    return re.findall(r"^  --(\w+)(?: |$)", page, re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_common_page_is_short_and_names_options_that_exist(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = common_page(program)
    known = known_options(program)
    own = {name for name in known if name not in known_options()}
    assert {*program.common} <= known.keys()
    assert {*listed(page)} == {*program.common, *ACTIONS} | own
    lines = page.splitlines()
    assert len(lines) <= 90 and max(map(len, lines[1:])) <= 80
    assert all(name in page for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_page_of_a_method_has_exactly_its_options(method: str) -> None:
    page = help_page([("help", [method])], TRAIN)
    assert page is not None and METHODS[method].summary in page
    assert listed(page) == [n for n, o in known_options().items() if o.method == method]


def test_help_after_a_method_is_printed_and_ends_the_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--help", "sora"], ["--help=sora"], ["-h", "sora"]):
        with pytest.raises(SystemExit) as left:
            load_config(words)
        assert left.value.code == 0
        assert capsys.readouterr().out.startswith("--method sora: ")


@pytest.mark.parametrize(
    ("words", "found"),
    [(["soar"], "'soar'; did you mean sora?"), (["sora", "lora"], "'sora lora'")],
)
def test_help_for_an_unknown_method_names_those_there_are(words: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--help", *words])
    (problem,) = caught.value.problems
    assert f"got {found}" in problem and ", ".join(METHODS) in problem


def test_help_all_lists_every_option() -> None:
    page = help_page([("help_all", [])], TRAIN)
    assert page is not None
    assert {*listed(page)} == {*known_options(), *ACTIONS}
    assert "[None]" not in page and "[()]" not in page and "[16]" in page
