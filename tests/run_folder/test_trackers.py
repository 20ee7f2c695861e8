"""Trackers get a run's numbers, its id and its folder, and start no processes of their own."""

import errno
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import wandb
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from sparse_lora_dist.config.sections import TRACKERS
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.run_folder.metrics_log import Metrics

CONFIG = {"rank": 16, "trackers": ("a", "b"), "resume": "never"}


def open_metrics(
    folder: Path, *trackers: str, last_step: int | None = None, ids: dict[str, str] | None = None
) -> Metrics:
    return Metrics(folder, trackers, CONFIG, last_step=last_step, run_ids=ids or {})


def test_the_names_are_those_of_accelerate():
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_without_trackers_there_is_a_metrics_file_only(tmp_path):
    metrics = open_metrics(tmp_path)
    metrics.log({"step": 1, "loss": 2.0})
    metrics.close()
    assert metrics.run_ids == {}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_has_scalars_and_a_histogram_of_sites(tmp_path):
    metrics = open_metrics(tmp_path, "tensorboard")
    metrics.log({"step": 1, "loss": 2.0, "stage": "text"})
    metrics.log_sites(1, {"ranks": {"a": 3, "b": 5}})
    metrics.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert events.Histograms("sites/ranks")[0].histogram_value.max == 5


def test_tensorboard_drops_the_steps_that_a_resumed_run_does_again(tmp_path):
    first = open_metrics(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        first.log({"step": step, "loss": float(step)})
    first.close()
    second = open_metrics(tmp_path, "tensorboard", last_step=1)
    second.log({"step": 2, "loss": 20.0})
    second.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert [row["step"] for row in read_records(second.path)] == [1, 2]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def full(_writer: RecordWriter, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = open_metrics(tmp_path, "tensorboard")
    metrics.log({"step": 1, "loss": 2.0})
    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 6):
        metrics.log({"step": step, "loss": 2.0})
        metrics.log_sites(step, {"ranks": {"a": 3, "b": 5}})
    metrics.close()
    said = capsys.readouterr()
    assert said.out.count("the tracker tensorboard cannot log: [Errno 28] No space left") == 1
    assert "Traceback" not in said.err
    assert [row["step"] for row in read_records(metrics.path)] == [1, 2, 3, 4, 5]


def test_trackers_make_no_state_of_processes(tmp_path):
    before = dict(PartialState._shared_state)  # another library may have made one in this process
    metrics = open_metrics(tmp_path, "tensorboard")
    metrics.log({"step": 1, "loss": 2.0})
    metrics.close()
    assert PartialState._shared_state == before


class FakeRun:
    id = "abc"

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_the_run_folder_and_goes_on_by_its_id(monkeypatch, tmp_path):
    calls, run = [], FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **given: calls.append(given) or run)
    first = open_metrics(tmp_path, "wandb")
    first.log({"step": 1, "loss": 2.0})
    first.close()
    assert run.logged == [({"loss": 2.0}, 1)] and run.finished
    open_metrics(tmp_path, "wandb", last_step=1, ids=first.run_ids)
    assert [call["id"] for call in calls] == [None, "abc"]
    for call in calls:
        assert call["project"] is None  # so that WANDB_PROJECT decides
        assert call["resume"] == "allow"
        assert (call["dir"], call["name"]) == (str(tmp_path), tmp_path.name)
        assert call["config"] == CONFIG


def test_mlflow_goes_on_by_its_id(monkeypatch, tmp_path):
    started, params, logged = [], [], []

    def start_run(**given: Any) -> Any:
        started.append(given)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    fake = types.SimpleNamespace(
        search_experiments=lambda **_: [],
        create_experiment=lambda **given: given["name"],
        start_run=start_run,
        log_params=params.append,
        log_metrics=lambda values, step: logged.append((values, step)),
        end_run=lambda: None,
        utils=types.SimpleNamespace(validation=limits),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    first = open_metrics(tmp_path, "mlflow")
    first.log({"step": 3, "loss": 2.0})
    first.close()
    open_metrics(tmp_path, "mlflow", last_step=3, ids=first.run_ids)
    assert first.run_ids == {"mlflow": "r1"}
    assert [call["run_id"] for call in started] == [None, "r1"]
    assert started[0]["run_name"] == tmp_path.name
    assert logged == [({"loss": 2.0}, 3)]
    # Once: MLflow refuses a parameter that changes, as --resume does.
    assert params == [{"rank": 16, "trackers": "('a', 'b')", "resume": "never"}]


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install mlflow"):
        open_metrics(tmp_path, "mlflow")
