"""What workers run for ``test_decisions.py``: a run in which one rank goes astray after step 5."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import nn

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.sparsity import decisions as deciding
from sparse_lora_dist.sparsity.decisions import Decisions
from tests.fixtures.toy_method import TOY, toy
from tests.work.run import train_toy

STEP, ASTRAY = 6, 1
"""The toy method decides at even steps."""


def refusal_after(flags: list[str], what: str) -> str:
    """What every rank says when ``what`` happens to rank 1 just before the decision of step 6, or
    just after it."""
    hurt = {"master": _hurt_master, "live copy": _hurt_live_copy, "gathered": _hurt_gathered}
    make, confirm = Decisions.make, Decisions.confirm

    def hurt_before(self: Decisions, step: int) -> Any:
        if what == "master" and step == STEP and comm.rank() == ASTRAY:
            hurt[what](self)
        return make(self, step)

    def hurt_after(self: Decisions, step: int) -> None:
        if what in ("live copy", "gathered") and step == STEP and comm.rank() == ASTRAY:
            hurt[what](self)
        confirm(self, step)

    factory = replace(TOY, build=_astray) if what == "decision" else TOY
    with (
        patch.object(Decisions, "make", hurt_before),
        patch.object(Decisions, "confirm", hurt_after),
        patch("tests.fixtures.toy_method.TOY", factory),
        patch.object(
            deciding, "gathered", deciding.gathered
        ),  # put back what _hurt_gathered replaces
    ):
        try:
            train_toy(flags)
        except UserError as error:
            return str(error)
    return "nothing"


def _hurt_master(decisions: Decisions) -> None:
    """An entry that is dead moves: the last of some tensor's own part."""
    shards = decisions.shards
    for name, mask in shards.live().items():
        if name in shards.sparse and not mask.all():
            dead = int((~mask).nonzero()[0])
            shards.engine.master(shards.sparse[name])[dead] = 1.0
            return


def _hurt_live_copy(decisions: Decisions) -> None:
    """This rank's part of a tensor, as forward will gather it, is not the master's."""
    engine, name = decisions.shards.engine, next(iter(decisions.shards.sparse))
    parameter: Any = engine.trained[name]
    assert parameter.data.numel() == 0, "between steps a rank holds its share only"
    parameter.ds_tensor.fill_(0.0)


def _hurt_gathered(decisions: Decisions) -> None:
    """What this rank gathers of a tensor is not what the others gather."""
    wrong = next(iter(decisions.shards.sparse.values()))
    gathered = deciding.gathered

    @contextmanager
    def hurt(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        found = list(parameters)
        with gathered(found):
            found[0].data.view(-1)[wrong.numel - 1] = 0.0
            yield

    deciding.gathered = hurt


def _astray(options: Any, plan: Any) -> Any:
    method = toy(options, plan)

    def decide(step: int, scores: Any) -> Any:
        decision = method.decide(step, scores)
        wrong = step == STEP and comm.rank() == ASTRAY
        return replace(decision, log_values={"keep": 0.123}) if wrong else decision

    return replace(method, decide=decide)
