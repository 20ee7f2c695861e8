"""Define the three things in which a run of launcher/edit.py differs from one of launcher/train.py:
its data, its action after the last step, and whether it replaces an earlier run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.training.feed import DataFeed
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.training.own_folder import TRAIN


def ask_nothing(job: Job) -> None:
    """Do nothing. This is the action of launcher/train.py after the last step, since it measures
    the held-out loss during the run."""


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """Purpose of a run: its data, its action after the last step, and whether it replaces an
    earlier run.

    With the default values, the run trains on ``--data``. All ranks call the functions.
    """

    open_feed: Callable[[Config, Model], DataFeed] | None = None
    """Function of (config, model) that reads the data of the run; None reads ``--data`` and
    ``--eval_data``."""
    conclude: Callable[[Job], None] = ask_nothing
    """Function that is called after the last step of the run, before the adapter is exported. If
    the run is stopped during that call, the resumed run calls it again."""
    program: str = TRAIN
    """The program that makes the run: TRAIN or EDIT of ``training/own_folder.py``. Neither goes on
    with, nor replaces, a run of the other."""
    replaces: bool = False
    """True if the run first removes the files of an earlier run from its folder."""
    own: Mapping[str, object] = field(default_factory=dict)
    """{option: value} of what only this program has, for ``check_same_command``."""


TRAINING = Purpose()
"""Purpose of the runs of launcher/train.py."""
