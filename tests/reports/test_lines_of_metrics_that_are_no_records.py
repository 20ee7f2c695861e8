"""A damaged, blank or foreign line in metrics.jsonl, made by an editor, a disk or a crash."""

import json
from pathlib import Path

import pytest

from sparse_lora_dist.config.yaml_file import parse_yaml
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report.jsonl import read_lines
from sparse_lora_dist.report.run_data import _mapping, read_run
from sparse_lora_dist.run_folder.metrics_file import JsonLines, read_records

ROWS = [{"step": number, "loss": 0.5 * number} for number in range(6)]
LINES = [json.dumps(row).encode() for row in ROWS]


@pytest.mark.parametrize(
    "line", [b"", b"# mine", b"[]", b"5", b"{}", b'{"step": "x"}', b"\xff\xfe", b"[" * 100_000]
)
def test_later_records_are_not_lost_and_the_line_stays_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0], line, *LINES[1:]]) + b"\n")
    assert read_records(path) == ROWS
    lines = JsonLines(path, last_step=4)  # a resume from step 4 makes step 5 again
    assert path.read_bytes() == b"\n".join([LINES[0], line, *LINES[1:5]]) + b"\n"
    said = capsys.readouterr().out
    assert f"warning   {path}: line 2 is no record of this run. It stays" in said
    lines.append({"step": 5})
    assert read_records(path) == [*ROWS[:5], {"step": 5}]


def test_a_file_of_records_alone_is_not_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    before = path.stat()
    JsonLines(path, last_step=5)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("half", [b'{"step": 6, "lo', b'{"step": 6}'])
def test_half_a_record_of_a_killed_job_goes_and_a_whole_one_gets_its_line_break(
    tmp_path: Path, half: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES, half]))
    lines = JsonLines(path, last_step=6)
    lines.append({"step": 7})
    steps = [row["step"] for row in read_records(path)]
    assert steps == [0, 1, 2, 3, 4, 5, *([6] if half.endswith(b"}") else []), 7]
    assert path.read_bytes().count(b"\n") == len(steps)


def test_a_file_with_line_ends_of_another_system_stays_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that end with a carriage return alone are one line here, but no half record."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\r".join(LINES) + b"\r")
    before = path.read_bytes()
    lines = JsonLines(path, last_step=4)
    assert path.read_bytes() == before
    said = capsys.readouterr().out
    assert f"warning   {path}: line 1 is no record of this run. It stays" in said
    lines.append({"step": 5})
    assert path.read_bytes() == before + b'\n{"step": 5}\n'


@pytest.mark.parametrize(
    "order", [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 2, 3]], ids=["reversed", "doubled"]
)
def test_the_report_has_records_by_step_and_says_if_the_file_has_not(
    tmp_path: Path, order: list[int]
) -> None:
    (tmp_path / "run.yaml").write_text("method: lora\n")
    (tmp_path / "environment.json").write_text("{}")
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(ROWS[n]) + "\n" for n in [0, 1, 2, 3, 4, 5]))
    assert read_run(tmp_path).notes == []
    path.write_text("".join(json.dumps(ROWS[n]) + "\n" for n in order))
    found = read_run(tmp_path)
    assert (found.metrics, found.last_step) == (ROWS, 5)
    (note,) = found.notes
    assert str(path) in note and "not in the order of their steps" in note


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5_000, "NaN", "nul"])
def test_the_report_names_the_line_that_it_cannot_read(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2 is not valid JSON"):
        read_lines(path, lambda record: True)


def test_the_report_refuses_a_run_yaml_that_would_explode(tmp_path: Path) -> None:
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path = tmp_path / "run.yaml"
    path.write_text("a0: &a0 x\n" + "\n".join(rows))
    with pytest.raises(UserError, match=r"run.yaml cannot be read: the alias \*a1 stands for"):
        _mapping(path, parse_yaml)
