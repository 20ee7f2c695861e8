"""Users had files come to the place of an evaluation's results while it worked, or had mounted a
file there."""

import errno
import os
from pathlib import Path

import pytest

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation import eval_options
from sparse_lora_dist.evaluation.eval_options import bad_output
from sparse_lora_dist.evaluation.results import publish

OURS = '{"results": [], "differences": []}\n'
NEW = '{"results": [1], "differences": []}\n'


def written(folder: Path, *, overwrite: bool) -> str:
    """Publish two files; what is said."""
    files = {"answers": folder / "a.jsonl", "output": folder / "o.json"}
    try:
        publish({"answers": "{}\n", "output": NEW}, files, overwrite=overwrite)
    except UserError as error:
        return str(error)
    return ""


def contents(folder: Path) -> dict[str, str]:
    """{name without its random end: content} of a folder."""
    return {p.name.split(".json.")[0]: p.read_text() for p in folder.iterdir()}


def test_results_take_the_names_that_were_asked_for(tmp_path: Path) -> None:
    assert written(tmp_path, overwrite=False) == ""
    assert contents(tmp_path) == {"a.jsonl": "{}\n", "o.json": NEW}


@pytest.mark.parametrize(
    ("came", "overwrite"), [(OURS, False), ("my notes", False), ("my notes", True)]
)
def test_a_file_that_came_meanwhile_stays_and_the_results_are_kept_beside_it(
    tmp_path: Path, came: str, overwrite: bool
) -> None:
    (tmp_path / "o.json").write_text(came)
    said = written(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"a.jsonl": "{}\n", "o.json": came, "kept_o": NEW}
    (kept,) = tmp_path.glob("kept_*")
    assert f"--output {tmp_path}/o.json was put there" in said and f"are in {kept}." in said


def test_both_results_are_kept_when_both_names_are_taken(tmp_path: Path) -> None:
    (tmp_path / "o.json").mkdir()
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    said = written(tmp_path, overwrite=True)
    assert said.count("was put there") == 2
    assert sorted(p.read_text() for p in tmp_path.glob("kept_*")) == sorted(["{}\n", NEW])
    assert (tmp_path / "o.json").is_dir() and (tmp_path / "a.jsonl").is_symlink()


def test_an_earlier_evaluation_is_replaced_when_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(OURS)
    assert written(tmp_path, overwrite=True) == ""
    assert contents(tmp_path) == {"a.jsonl": "{}\n", "o.json": NEW}


def test_a_file_system_without_links_loses_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "o.json").write_text("my notes")
    assert "was put there" in written(tmp_path, overwrite=False)
    assert contents(tmp_path) == {"a.jsonl": "{}\n", "o.json": "my notes", "kept_o": NEW}


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_pipe_or_a_link_to_nothing_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "o.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    assert "exists already" in bad_output("output", path, overwrite=False)[0]
    assert "is no file that --output has written" in bad_output("output", path, overwrite=True)[0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_is_mounted_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """docker run -v $PWD/o.json:/w/o.json"""
    path = tmp_path / "o.json"
    monkeypatch.setattr(eval_options, "is_mount_point", path.__eq__)
    assert not bad_output("output", path, overwrite=overwrite)
    path.write_text("")
    (said,) = bad_output("output", path, overwrite=overwrite)
    assert said.startswith(f"--output {path} is a mount point") and "Mount the folder" in said


def refuses_to_replace(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not let the file NAME be replaced: it is mounted, or cannot be changed."""
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.EACCES])
def test_results_whose_place_cannot_be_replaced_at_the_end_are_kept_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuses_to_replace("a.jsonl", number, monkeypatch)
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "o.json").write_text(OURS)
    said = written(tmp_path, overwrite=True)
    (kept,) = tmp_path.glob("kept_*")
    assert kept.read_text() == "{}\n" and (tmp_path / "o.json").read_text() == NEW
    assert f"--answers {tmp_path}/a.jsonl cannot be written: {os.strerror(number)}." in said
    assert f"The results are in {kept}." in said
    assert not list(tmp_path.glob(".tmp_*"))


def test_a_full_disk_is_tried_again_with_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses_to_replace("a.jsonl", errno.ENOSPC, monkeypatch)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("failing", [{1}, {2}, {3, 4, 5}, {1, 2, 3, 4}])
def test_a_lost_page_is_no_success_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: set[int]
) -> None:
    """Linux says once that a page was not written; a second fsync says that all is well."""
    calls: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) in failing:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if failing & {1, 2}:  # one of each file
        with pytest.raises(OSError, match="Input/output"):
            written(tmp_path, overwrite=False)
        assert not list(tmp_path.iterdir())
        failing.clear()
    assert written(tmp_path, overwrite=False) == ""
    assert sorted(contents(tmp_path)) == ["a.jsonl", "o.json"]
