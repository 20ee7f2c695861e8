"""Folders of other users, disks that are away, links in circles, a current folder that is gone."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist.checkpoint.recover import find_damage, published, published_for_all
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.paths import real_path
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.eval_options import load_request as eval_request
from sparse_lora_dist.export.export_command import _of_another_path
from sparse_lora_dist.plan.plan_options import load_request as plan_request
from sparse_lora_dist.report.report_command import names_of
from sparse_lora_dist.runtime import entry_point
from sparse_lora_dist.show.show_command import as_text
from tests.reports.conftest import Left

LOCKED = "locked"
WRONG = (errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ESTALE, errno.EIO)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that lets every look into the folder ``LOCKED`` fail with an errno. (Root may
    enter all folders, so a test cannot lock one.)"""
    stat = os.stat
    scandir, listdir = os.scandir, os.listdir

    def let_fail(number: int) -> None:
        def guarded(function: Callable[..., Any], inside: str) -> Callable[..., Any]:
            def call(path: Any = ".", *args: Any, **given: Any) -> Any:
                if inside in os.fsdecode(path if not isinstance(path, int) else "") + "/":
                    raise OSError(number, os.strerror(number), os.fsdecode(path))
                return function(path, *args, **given)

            return call

        monkeypatch.setattr(os, "stat", guarded(stat, f"/{LOCKED}/x"))
        monkeypatch.setattr(os, "scandir", guarded(scandir, f"/{LOCKED}/"))
        monkeypatch.setattr(os, "listdir", guarded(listdir, f"/{LOCKED}/"))

    return let_fail


def run(argv: Sequence[str], read: Callable[[Sequence[str]], Any]) -> None:
    with pytest.raises(Left):
        entry_point.run_program(argv, read, lambda config: None)


OPTIONS = ["data", "eval_data", "model", "output_dir", "resume", "chat_template", "init_adapter"]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_in_a_folder_of_another_user_is_refused_in_one_sentence(
    option: str,
    fails: Callable[[int], None],
    status: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails(errno.EACCES)
    path = tmp_path / LOCKED / "x"
    run([f"--{option}", str(path)], load_config)
    said = capsys.readouterr().err
    assert status == [2] and "Traceback" not in said
    assert f"{path} cannot be used: Permission denied. Ask its owner" in said


@pytest.mark.parametrize("number", WRONG)
@pytest.mark.parametrize(
    ("option", "read"),
    [("--data", load_config), ("--output", eval_request), ("--plot", plan_request)],
    ids=["train", "eval", "plan"],
)
def test_a_disk_that_is_away_is_told_in_one_sentence(
    number: int,
    option: str,
    read: Callable[[Sequence[str]], Any],
    fails: Callable[[int], None],
    status: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails(number)
    run([option, str(tmp_path / LOCKED / "x")], read)
    said = capsys.readouterr().err
    assert status == [2] and os.strerror(number) in said and "Traceback" not in said


@pytest.mark.parametrize("number", WRONG)
def test_work_that_meets_such_a_path_says_so(
    number: int, status: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: Config) -> None:
        raise OSError(number, "text", "/a/b")

    with pytest.raises(Left):
        entry_point.run_program([], lambda argv: Config(), work)
    said = capsys.readouterr().err
    assert status == [2] and "error: /a/b cannot be used" in said and "Traceback" not in said


def test_a_bug_keeps_its_traceback(status: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: Config) -> None:
        raise FileNotFoundError(errno.ENOENT, "text", "/a/b")

    with pytest.raises(Left):
        entry_point.run_program([], lambda argv: Config(), work)
    assert status == [1] and "Traceback" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_listed_are_not_none(
    fails: Callable[[int], None], tmp_path: Path
) -> None:
    (tmp_path / LOCKED).mkdir()
    assert published(tmp_path / LOCKED) == [] == published(tmp_path / "none")
    fails(errno.EACCES)
    for list_them in (published, published_for_all):
        with pytest.raises(UserError, match="cannot be used: Permission denied"):
            list_them(tmp_path / LOCKED)


def test_one_locked_checkpoint_is_damaged_and_the_others_are_found(
    fails: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        (tmp_path / f"step_{number:08d}").mkdir()
        (tmp_path / f"step_{number:08d}/manifest.json").write_text("{}")
    stat = os.stat

    def guarded(path: Any, *args: Any, **given: Any) -> Any:
        if os.fsdecode(path).endswith("2/manifest.json"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
        return stat(path, *args, **given)

    monkeypatch.setattr(os, "stat", guarded)
    found = published(tmp_path)
    assert [path.name for path in found] == ["step_00000001", "step_00000002"]
    damage = find_damage(found[1])
    assert damage is not None and "cannot be used: Permission denied. Ask" in damage


def test_an_adapter_that_may_not_be_read_is_not_called_damaged(
    fails: Callable[[int], None], tmp_path: Path
) -> None:
    (tmp_path / LOCKED).mkdir()
    fails(errno.EACCES)
    with pytest.raises(UserError, match="Permission denied") as caught:
        as_text(tmp_path / LOCKED)
    assert "damaged" not in str(caught.value)


def test_an_export_names_the_base_that_it_may_not_read(tmp_path: Path) -> None:
    final = tmp_path / "out"
    told = {
        tmp_path / "base/config.json": True,
        Path("/elsewhere/config.json"): True,
        tmp_path: False,
        final: False,
        final / "README.md": False,
        tmp_path / ".tmp_out.12/README.md": False,
    }
    for path, is_told in told.items():
        error = PermissionError(errno.EACCES, "Permission denied", str(path))
        assert (_of_another_path(error, final) is not None) == is_told, path


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, loop / "below"):
        with pytest.raises(UserError, match="link that leads back to itself"):
            real_path("--output", path)
    with pytest.raises(UserError, match="link that leads back to itself"):
        names_of([loop])


def test_a_current_folder_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        with pytest.raises(UserError, match="current folder was removed"):
            real_path("--output", Path("x"))
    finally:
        os.chdir(tmp_path)


def test_a_name_that_is_not_utf8_is_refused_through_a_link_and_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsencode(tmp_path) + b"/a\xff"
    os.mkdir(odd)
    (tmp_path / "link").symlink_to(os.fsdecode(odd))
    with pytest.raises(UserError, match="whose name is not UTF-8") as caught:
        real_path("--output", tmp_path / "link")
    assert str(caught.value).isascii()
    monkeypatch.chdir(os.fsdecode(odd))
    with pytest.raises(UserError, match="whose name is not UTF-8"):
        names_of([Path(".")])
