"""--resume auto in the folder of a run whose checkpoints are gone, or that never had one."""

import json
import shutil
from pathlib import Path

import pytest

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.own_files import Marker, write_marker
from sparse_lora_dist.training.own_folder import RUN, TRAIN, check_folder

RECORDS = ["metrics.jsonl", "attempts.jsonl"]


def lines(path: Path, *records: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was killed before its first checkpoint, after it had logged a step."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines(folder / "metrics.jsonl", {"step": 0}, {"step": 10})
    lines(folder / "attempts.jsonl", {"event": "begins", "step": 0})
    write_marker(folder, Marker(kind=RUN, names=dict.fromkeys(RECORDS)))
    return folder


def has(run: Path, *names: str) -> None:
    write_marker(run, Marker(kind=RUN, names=dict.fromkeys([*RECORDS, *names])))


def resumes(run: Path) -> None:
    check_folder(run, begins=False, program=TRAIN)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(run: Path) -> None:
    resumes(run)
    lines(run / "attempts.jsonl", {"event": "begins", "step": 0}, {"event": "stopped", "step": 0})
    resumes(run)  # stopped before the first step


def test_a_run_killed_while_it_saved_its_first_checkpoint_begins_anew(run: Path) -> None:
    (run / "checkpoints").mkdir()
    resumes(run)  # made, and not yet claimed
    has(run, "checkpoints")
    (run / "checkpoints" / ".tmp_step_00000010.0123456789abcdef").mkdir()
    resumes(run)


def test_an_adapter_is_never_replaced_by_a_run_that_begins_anew(run: Path) -> None:
    has(run, "adapter")
    (run / "adapter").mkdir()
    resumes(run)
    lines(run / "adapter" / "adapter_config.json", {})
    write_marker(run / "adapter", Marker(kind="export", names={"adapter_config.json": None}))
    with pytest.raises(UserError, match=r"none of them is there now. It left adapter/. --resume"):
        resumes(run)


@pytest.mark.parametrize("event", ["stopped", "finished", "begins"])
def test_records_of_a_run_that_has_saved_are_never_removed(run: Path, event: str) -> None:
    lines(run / "attempts.jsonl", {"event": "begins", "step": 0}, {"event": event, "step": 4})
    with pytest.raises(UserError, match=rf"attempts.jsonl \(a job {event} at step 4\).*Put its"):
        resumes(run)


def test_records_of_a_killed_run_stay_if_its_checkpoints_were_removed(run: Path) -> None:
    has(run, "checkpoints")
    with pytest.raises(UserError, match=r"It left metrics.jsonl \(up to step 10\)"):
        resumes(run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    with pytest.raises(UserError, match="It left checkpoints/latest"):
        resumes(run)
    shutil.rmtree(run / "checkpoints")
    lines(run / "metrics.jsonl", {"step": 0})
    resumes(run)  # nothing but the loss of the base is lost
