"""What a run is for: all in which editing differs from training."""

from collections.abc import Callable
from dataclasses import dataclass

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.training.feed import DataFeed
from sparse_lora_dist.training.job import Job


def ask_nothing(job: Job) -> None:
    """The held-out loss has said it."""


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """By default to train on ``--data``. Its functions are collectives."""

    open_feed: Callable[[Config, Model], DataFeed] | None = None
    """What the loop eats; None is what ``--data`` says."""
    conclude: Callable[[Job], None] = ask_nothing
    """After the last step of the schedule, before the adapter is exported. Told to stop there, a
    run that goes on does it again."""
    replaces: bool = False
    """Does the run take the place of an earlier one in its folder?"""


TRAINING = Purpose()
