"""Start experiment trackers (TensorBoard, W&B, MLflow ...) with the classes of accelerate.tracking.

Only rank 0 has trackers. accelerate's ``PartialState`` is never created: it might start a process
group of its own, select a device or set environment variables, and this process has its group and
device already.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import tracking
from accelerate.logging import MultiProcessAdapter
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from sparse_lora_dist.errors import UserError

PROJECT = "sparse_lora_dist"
"""Name of the project or experiment, for trackers that need one and take it from no environment
variable."""


class _LocalLogger(MultiProcessAdapter):  # type: ignore[misc]
    """Logger for accelerate's trackers that works without a ``PartialState``. The ``log`` of its
    base class raises an error without one, even for messages below the log level."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        self.logger.log(level, msg, *args, **kwargs)


def start_trackers(
    names: Sequence[str],
    folder: Path,
    config: Mapping[str, object],
    *,
    last_step: int | None,
    run_ids: Mapping[str, str],
) -> list[GeneralTracker]:
    """Start trackers, and return them in the order of ``names``. Call it on rank 0 only.

    Args:
        names: names of trackers, keys of accelerate's ``LOGGER_TYPE_TO_CLASS``, e.g. "wandb".
        folder: the run folder; trackers show its name as the name of the run.
        config: options of the run by name, which the trackers show.
        last_step: step that a resumed run starts from; None for a new run.
        run_ids: dict from the name of a tracker to its id for the run that is resumed (see
            ``run_id``); {} for a new run.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    tracking.logger = _LocalLogger(logging.getLogger(tracking.__name__), {})
    threading.excepthook = partial(_but_of_storage, threading.excepthook)
    trackers = []
    for name in names:
        tracker = _build(name, folder, config, last_step, run_ids.get(name))
        tracker.main_process_only = False  # True would create a PartialState
        try:
            tracker.start()
        except ImportError as error:
            raise UserError(
                f"--trackers {name} needs a package that is not installed ({error}). "
                f"Install it with: pip install {name}"
            ) from error
        # W&B gets the options in start(). TensorBoard would show them as a second run.
        if name not in ("tensorboard", "wandb") and name not in run_ids:
            tracker.store_init_configuration({k: _plain(v) for k, v in config.items()})
        trackers.append(tracker)
    return trackers


def _but_of_storage(otherwise: Callable[[Any], object], args: threading.ExceptHookArgs) -> None:
    """Print an uncaught exception of a thread, but not what storage does to TensorBoard's writer:
    that is raised again at its next record (``Metrics.log``)."""
    of_writer = type(args.thread).__module__.startswith("tensorboard.")
    if not (of_writer and isinstance(args.exc_value, OSError)):
        otherwise(args)


def run_id(tracker: GeneralTracker) -> str | None:
    """Return the id that W&B or MLflow gave to the run, with which a resumed run continues the same
    run there. Return None for other trackers: TensorBoard and DVCLive continue from their files,
    and the others show a resumed run as a new one."""
    if tracker.name == "wandb":
        return str(tracker.tracker.id)
    if tracker.name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return None


def log_histograms(tracker: GeneralTracker, step: int, values: Mapping[str, Sequence[int]]) -> None:
    """Add histograms to TensorBoard. The other trackers have no common call for histograms.

    Args:
        tracker: a started tracker, used only if it is TensorBoard.
        step: optimizer step after which the values were measured.
        values: dict from the tag (title) of a histogram to the values that it counts.
    """
    if tracker.name == "tensorboard":
        for tag, numbers in values.items():
            tracker.tracker.add_histogram(tag, torch.tensor(numbers), step)


def _build(
    name: str, folder: Path, config: Mapping[str, object], last_step: int | None, own_id: str | None
) -> GeneralTracker:
    """Make a tracker without starting it. Its files, if it writes any, go into ``folder``.

    Args:
        name: name of the tracker, a key of ``LOGGER_TYPE_TO_CLASS``.
        folder: the run folder.
        config: options of the run by name.
        last_step: step that a resumed run starts from; None for a new run.
        own_id: the tracker's id for the run that is resumed (see ``run_id``); None for a new run,
            or if the tracker has none.
    """
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # its events lie in logging_dir/name
        first_step = 0 if last_step is None else last_step + 1
        return tracker_class(name, logging_dir=str(folder), purge_step=first_step)
    if name == "wandb":
        return tracker_class(
            None,  # project: with None, W&B takes WANDB_PROJECT
            dir=str(folder),
            config=dict(config),
            name=folder.name,
            id=own_id,
            resume="allow",
            settings={"silent": True},
        )
    if name == "mlflow":
        return tracker_class(PROJECT, run_name=folder.name, run_id=own_id)
    if name == "dvclive":
        return tracker_class(dir=str(folder / name), resume=last_step is not None)
    if name == "trackio":
        return tracker_class(PROJECT, name=folder.name)
    if name in ("comet_ml", "swanlab"):  # None: take the project from the environment
        return tracker_class(None)
    if tracker_class.requires_logging_directory:
        return tracker_class(folder.name, logging_dir=str(folder))
    return tracker_class(folder.name)


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
