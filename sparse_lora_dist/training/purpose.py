"""Purpose of a run: the three points in which editing differs from training."""

from collections.abc import Callable
from dataclasses import dataclass

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.training.feed import DataFeed
from sparse_lora_dist.training.job import Job


def ask_nothing(job: Job) -> None:
    """Do nothing more: training is judged by its held-out loss."""


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What a run is for; by default, to train on ``--data``. Its functions are collectives."""

    open_feed: Callable[[Config, Model], DataFeed] | None = None
    """Opens the data of the run; None opens ``--data``."""
    conclude: Callable[[Job], None] = ask_nothing
    """Called after the last step of the run, before the adapter is exported. A run that is stopped
    in it and resumed calls it again."""
    replaces: bool = False
    """Whether the run replaces an earlier one in its folder."""


TRAINING = Purpose()
"""The purpose of launcher/train.py."""
