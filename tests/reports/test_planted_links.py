"""Links, folders and files of others under names that the program uses, in a shared folder."""

import json
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report.page import Section
from sparse_lora_dist.report.report_command import save_all
from sparse_lora_dist.report.style import Picture
from sparse_lora_dist.run_folder import lock
from sparse_lora_dist.system.atomic_files import beside, create, write_whole
from sparse_lora_dist.training.own_folder import TRAIN, begin, check_folder
from tests.run_folder.test_run_lock import of_another_host


def test_a_report_is_not_written_through_a_link_beside_it(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".tmp_report.html").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "report.html", "the report")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "report.html").read_text() == "the report"
    (tmp_path / "link.html").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "link.html", "the report")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "link.html").is_symlink()


def test_temporary_names_are_random_and_files_are_created_exclusively(tmp_path: Path) -> None:
    names = {beside(tmp_path / ("x" * 255)).name for _ in range(100)}
    assert len(names) == 100 and max(map(len, names)) <= 255
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "link", tmp_path):
        with pytest.raises(FileExistsError):
            create(path, b"content")
    assert not (tmp_path / "nowhere").exists()


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("what", ["a symbolic link", "no file", "a file that this program has not"])
def test_a_lock_that_no_job_has_made_is_refused_by_name_and_stays(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / "run.lock"
    if what == "a symbolic link":
        path.symlink_to(tmp_path / "nowhere")
    elif what == "no file":
        path.mkdir()
    else:
        path.write_text("terraform")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"run.lock is {what}"), lock.held(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_a_lock_with_values_of_wrong_types_is_no_lock(tmp_path: Path) -> None:
    holder = json.loads(of_another_host())
    for change in ({"attempt": "x"}, {"token": 5}, {"process": holder["process"] | {"pid": []}}):
        (tmp_path / "run.lock").write_text(json.dumps(holder | change))
        assert not lock.is_lock(tmp_path / "run.lock")
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    assert lock.is_lock(tmp_path / "run.lock")


def check(folder: Path, *, begins: bool = False) -> None:
    check_folder(folder, begins=begins, program=TRAIN)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ranks", "is no folder"),
        ("checkpoints", "which this run has not made"),
        ("adapter", "which this run has not made"),
        ("stages.jsonl", "which this run has not made"),
    ],
)
def test_a_file_under_a_name_that_the_run_needs_is_refused_at_the_start(
    tmp_path: Path, name: str, said: str
) -> None:
    begin(tmp_path, program=TRAIN, source=None)
    check(tmp_path, begins=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}, which.*Move it away") as error:
        check(tmp_path)
    assert said in str(error.value)
    assert (tmp_path / name).read_text() == "mine"


def test_links_to_folders_are_served_and_links_to_nothing_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    begin(run, program=TRAIN, source=None)
    marker = run / ".sparse_lora_dist.json"
    names = {"checkpoints": None, "adapter": None}
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"names": names}))
    for name in names:
        (run / name).symlink_to(tmp_path / "disk")
        with pytest.raises(UserError, match=f"{name}, which is no folder, or a link"):
            check(run)
        (tmp_path / "disk").mkdir()
        check(run)
        (tmp_path / "disk").rmdir()
        (run / name).unlink()


@pytest.mark.parametrize("name", ["lost+found", ".snapshot", ".nfs00a1"])
def test_what_a_file_system_makes_at_a_mount_point_is_nobodys(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    check(tmp_path, begins=True)


def test_what_a_job_leaves_that_is_killed_before_it_marks_its_folder_is_no_hindrance(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.lock").write_text(of_another_host())
    (tmp_path / "ranks").mkdir()
    (tmp_path / ".tmp_.sparse_lora_dist.json.0123456789abcdef").write_text("{")
    check(tmp_path, begins=True)
    (tmp_path / "ranks" / "rank_00000.json").write_text("mine")
    with pytest.raises(UserError, match="it holds ranks"):
        check(tmp_path, begins=True)


def test_a_folder_that_is_a_file_or_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "link", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="--output_dir"):
            check(path, begins=True)


def test_figures_replace_figures_of_this_program_and_no_others(tmp_path: Path) -> None:
    drawn = [
        Picture(name=name, title=name, caption="", figure=Figure(figsize=(2, 2)))
        for name in ("loss", "ranks")
    ]
    sections = [Section(title="Over the run", pictures=drawn), Section(title="a", pictures=[])]
    save_all(tmp_path / "figures", [], sections)
    save_all(tmp_path / "figures", [], sections)  # its own
    before = (tmp_path / "figures" / "ranks.png").read_bytes()
    (tmp_path / "figures" / "ranks.png").write_bytes(b"mine")
    (tmp_path / "figures" / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"ranks\.png is not a figure of this program"):
        save_all(tmp_path / "figures", [], sections)
    assert (tmp_path / "figures" / "ranks.png").read_bytes() == b"mine" != before
    assert (tmp_path / "figures" / "mine.png").read_bytes() == b"mine"
