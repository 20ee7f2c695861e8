"""Odd values of options: each is refused in one sentence, or means the same everywhere."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from sparse_lora_dist.config import paths
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.editing import edit_options
from sparse_lora_dist.errors import ConfigError
from sparse_lora_dist.evaluation import eval_options
from sparse_lora_dist.export import export_options
from sparse_lora_dist.plan import plan_options
from sparse_lora_dist.report import report_options
from sparse_lora_dist.show import show_options
from tests.config.test_config import problems_of

BOMB = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{f'*{a}, ' * 9}]" for a, b in pairwise("abcdefghij")]
)
"""Ten lines that describe a list of 9^10 items."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, which is not the working directory, and embedded assets that exist."""
    work, home = tmp_path / "work", tmp_path / "home"
    (work / "ds_configs").mkdir(parents=True)
    (work / "ds_configs/zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    for path in paths.EMBEDDED.values():
        (tmp_path / "assets" / path).mkdir(parents=True)
    home.mkdir()
    monkeypatch.setattr(paths, "ASSETS", tmp_path / "assets")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    return home


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("model", "m"),
        ("data", "d"),
        ("eval_data", "d"),
        ("init_adapter", "m"),
        ("base_cache", "new"),
        ("output_dir", "new"),
        ("resume", "m"),
        ("verify", "m"),
        ("chat_template", "t.jinja"),
        ("ds_config", "e.json"),
    ],
)
@pytest.mark.parametrize("way", ["flag", "yaml"])
def test_a_tilde_is_the_home_in_every_option(home: Path, flag: str, name: str, way: str) -> None:
    for folder in ("m", "d"):
        (home / folder).mkdir()
    (home / "t.jinja").write_text("x")
    (home / "e.json").write_text('{"zero_optimization": {"stage": 3}}')
    Path("o.yaml").write_text(f"{flag}: ~/{name}\n")
    argv = [f"--{flag}", f"~/{name}"] if way == "flag" else ["--config", "o.yaml"]
    assert load_config(argv).as_flat_dict()[flag] == str(home / name)


def test_a_tilde_is_the_home_in_the_options_of_other_programs(home: Path) -> None:
    (home / "a").mkdir()
    (home / "e.json").write_text(json.dumps([{"subject": "a", "prompt": "a", "target_new": "b"}]))
    asked = export_options.load_request(
        ["~/a", "--output", "~/out", "--plus", "~/a,~/b", "--base", "~/a"]
    )
    given = (asked.source, asked.export.output, asked.export.plus, asked.export.base)
    assert given == (f"{home}/a", f"{home}/out", f"{home}/a,{home}/b", f"{home}/a")
    assert show_options.load_request(["~/a"]).path == home / "a"
    report = report_options.load_request(["~/a", "--output", "~/r.html"])
    assert (report.runs, report.output) == ((home / "a",), home / "r.html")
    plan = plan_options.load_request(["--plot", "~/p.png"]).plan
    assert plan.plot == str(home / "p.png")
    own = eval_options.load_request(["--compare", "~/a,base", "--answers", "~/x"]).own
    assert (own.compare, own.answers) == ((f"{home}/a", "base"), f"{home}/x")
    edit = edit_options.load_request(["--edits", "~/e.json"])
    assert edit.options.edits == f"{home}/e.json"


def test_the_home_of_a_user_who_does_not_exist_is_refused() -> None:
    (problem,) = problems_of("--model", "~nosuchuser/m")
    assert problem == (
        "--model ~nosuchuser/m cannot be found: there is no user nosuchuser. Write the path out"
    )


@pytest.mark.parametrize("value", ["x" * 300, "a/" * 2500 + "a"])
@pytest.mark.parametrize("flag", ["output_dir", "model", "data", "ds_config", "resume", "verify"])
def test_a_path_that_no_file_system_takes_is_refused(flag: str, value: str) -> None:
    (problem,) = problems_of(f"--{flag}", value)
    assert f"--{flag} is too long: a path has at most 4000 bytes" in problem
    assert len(problem) < 300


@pytest.mark.parametrize(
    "flag",
    "model data output_dir resume ds_config revision prompt_field chat_template trackers "
    "target_modules modules_to_save attn_implementation time_limit".split(),
)
@pytest.mark.parametrize("way", ["flag", "spaces", "yaml"])
def test_an_empty_word_is_refused(flag: str, way: str) -> None:
    """As an unset variable of a shell gives it."""
    word = " " if way == "spaces" else ""
    Path("o.yaml").write_text(f'{flag}: "{word}"\n')
    argv = ["--config", "o.yaml"] if way == "yaml" else [f"--{flag}", word]
    problems = problems_of(*argv)
    assert any(f"{flag} is empty. Give a value" in p for p in problems), problems


def test_a_list_without_words_is_refused_and_brackets_mean_none() -> None:
    (problem,) = problems_of("--modules_to_save")
    assert "--modules_to_save is empty" in problem
    assert load_config(["--trackers", "[]"]).run.trackers == ()


@pytest.mark.parametrize(
    ("flag", "digits"),
    [("rank", 25), *((n, d) for n in ("alpha", "rank", "time_limit") for d in (400, 5000))],
)
@pytest.mark.parametrize("way", ["flag", "yaml"])
def test_a_number_of_many_digits_is_refused(flag: str, digits: int, way: str) -> None:
    text = "9" * digits
    Path("o.yaml").write_text(f"{flag}: {text}\n")
    argv = ["--config", "o.yaml"] if way == "yaml" else [f"--{flag}", text]
    (problem,) = problems_of(*argv)
    assert f"{flag} must be" in problem and "got " in problem
    assert len(problem) < 300


def test_numbers_that_no_machine_can_serve_are_refused() -> None:
    flags = "--micro_batch_size 1000000 --gradient_accumulation_steps 1000000000"
    assert problems_of(*flags.split()) == [
        "--micro_batch_size must be at most 65536, got 1000000",
        "--gradient_accumulation_steps must be at most 65536, got 1000000000",
    ]
    with pytest.raises(ConfigError, match="--max_new_tokens must be at most 1048576"):
        eval_options.load_request(["--max_new_tokens", "10000000000"])


@pytest.mark.parametrize("value", ["99999999999999h", "9" * 400 + "s", "9" * 5000 + ":00:00"])
@pytest.mark.parametrize("flag", ["collective_timeout", "time_limit", "signal_lead"])
def test_a_duration_beyond_what_torch_counts_is_refused(flag: str, value: str) -> None:
    (problem,) = problems_of(f"--{flag}", value)
    assert f"--{flag} must be at most 366 days" in problem and len(problem) < 200


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("max_steps", "0100", 100),
        ("max_steps", "1_000", 1000),
        ("max_steps", "0x10", 16),
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", "0.01", 0.01),
        ("time_limit", "1:30:00", "1:30:00"),
        ("time_limit", "1-12:00:00", "1-12:00:00"),
        ("revision", "2024-12-31", "2024-12-31"),
        ("revision", "2024-31-12", "2024-31-12"),
        ("data", "a:b/c", "a:b/c"),
        ("packing", "no", False),
    ],
)
@pytest.mark.parametrize("way", ["flag", "yaml"])
def test_a_value_means_the_same_on_the_command_line_and_in_yaml(
    flag: str, text: str, value: object, way: str
) -> None:
    Path("a:b").mkdir()
    Path("a:b/c").mkdir()
    Path("o.yaml").write_text(f"{flag}: {text}\n")
    argv = ["--config", "o.yaml"] if way == "yaml" else [f"--{flag}", text]
    flags = ["--model", "owner/m"] if flag == "revision" else []
    assert load_config([*argv, *flags]).as_flat_dict()[flag] == value


@pytest.mark.parametrize("text", ["1:30", "1:30:00", "0o17", "0b11"])
@pytest.mark.parametrize("way", ["flag", "yaml"])
def test_what_yaml_1_1_alone_takes_for_a_number_is_refused(text: str, way: str) -> None:
    Path("o.yaml").write_text(f"seed: {text}\n")
    argv = ["--config", "o.yaml"] if way == "yaml" else ["--seed", text]
    (problem,) = problems_of(*argv)
    assert f"seed must be a whole number, got '{text}'" in problem


@pytest.mark.parametrize("flag", ["rank", "alpha", "resume", "packing", "trackers", "lr_schedule"])
def test_a_yaml_bomb_as_a_value_is_refused_at_once(flag: str) -> None:
    assert any(f"--{flag} " in problem for problem in problems_of(f"--{flag}", f"[{BOMB}]"))
    assert any(f"--{flag} " in problem for problem in problems_of(f"--{flag}", BOMB))


@pytest.mark.parametrize("flag", ["rank", "trackers", "packing"])
@pytest.mark.parametrize("value", ["[" * 2000, "[" * 500 + "]" * 500, "!!int abc", "a\0b"])
def test_values_that_the_yaml_parser_cannot_bear_are_refused(flag: str, value: str) -> None:
    problems = problems_of(f"--{flag}", value)
    assert any(f"--{flag} " in problem for problem in problems) and len(str(problems)) < 1000


def test_bytes_that_are_no_letters_are_refused_in_a_path() -> None:
    (problem,) = problems_of("--output_dir", os.fsdecode(b"runs/\xff"))
    assert "--output_dir must be a path in UTF-8" in problem


def test_results_and_answers_in_one_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="--output and --answers both name x"):
        eval_options.load_request(["--output", "x", "--answers", "./x"])


def test_a_plot_replaces_no_file_unless_asked_to() -> None:
    Path("thesis.png").write_text("mine")
    with pytest.raises(ConfigError, match="--plot thesis.png exists already"):
        plan_options.load_request(["--plot", "thesis.png"])
    plan_options.load_request(["--plot", "thesis.png", "--overwrite"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--format", "foo"], "--format must be one of peft, merged, sparse_delta, got foo"),
        (["--dtype", "fp8"], "--dtype must be one of bf16, fp32, got fp8"),
        (["--output", ""], "--output is empty"),
        (["--plus", "a,,b"], "--plus must be folders separated by commas"),
        (["--base", "~nosuchuser"], "there is no user nosuchuser"),
    ],
)
def test_an_export_says_what_it_takes(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export_options.load_request(["runs/a", "--output", "x", *argv])
    (problem,) = caught.value.problems
    assert said in problem and "typing" not in problem


@pytest.mark.parametrize("module", [report_options, show_options])
def test_an_empty_folder_name_is_refused_by_report_and_show(
    module: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        module.load_request([""])  # type: ignore[attr-defined]
    assert left.value.code == 2
    assert "it is empty" in capsys.readouterr().err


def test_a_dash_of_a_word_processor_in_a_list_is_refused() -> None:
    words = ["--column_names", "prompt,response", "\N{EN DASH}rank", "8"]
    with pytest.raises(ConfigError, match="begins with a dash of a word processor"):
        load_config(words)


@pytest.mark.parametrize("name", ["learning_rate", "alpha", "adam_eps", "weight_decay"])
def test_numbers_that_fp32_does_not_hold_are_refused(name: str) -> None:
    """1e39 is infinite in a step, and 1e-46 is 0: an eps of 0 makes 0 / 0 of a first step."""
    for value in ("1e39", "1e308", "1e-46", "5e-324"):
        with pytest.raises(ConfigError, match=f"--{name} must be 0 or a number that fp32 holds"):
            load_config([f"--{name}", value])
    assert load_config([f"--{name}", "3e38"]) and load_config([f"--{name}", "1e-37"])
