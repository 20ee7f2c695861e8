"""Define what a run is for by the three points in which editing differs from training."""

from collections.abc import Callable
from dataclasses import dataclass

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.training.feed import DataFeed
from sparse_lora_dist.training.job import Job


def ask_nothing(job: Job) -> None:
    """Do nothing after the last step. Training measures its held-out loss during the run."""


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """Purpose of a run: its data, its last action, and whether it replaces an earlier run.

    By default, the run trains on ``--data``. The functions are collectives.
    """

    open_feed: Callable[[Config, Model], DataFeed] | None = None
    """Function that opens the data of the run; None opens ``--data`` and ``--eval_data``."""
    conclude: Callable[[Job], None] = ask_nothing
    """Function that is called after the last step of the run, before the adapter is exported. If
    the run is stopped while it works, the resumed run calls it again."""
    replaces: bool = False
    """True if the run removes an earlier run from its folder first."""


TRAINING = Purpose()
"""The purpose of launcher/train.py."""
