"""Rotary positions whose frequencies transformers chooses by the longest document of a batch.

Reports: lablup/mlxcel#1358 (longrope), QwenLM/Qwen#401 (dynamic): a document's logits depend on
the documents beside it, or before it.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.training.fits import check_rope
from tests.fixtures.families import config_of, rope

SHORT, LONG, ROOM = 24, 96, 64
LONGROPE = rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8)
LONGROPE["rope_parameters"] |= {"original_max_position_embeddings": ROOM}
KINDS: dict[str, dict[str, Any]] = {
    "longrope": {
        **LONGROPE,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": ROOM,
    },
    "dynamic": {**rope("dynamic"), "max_position_embeddings": ROOM},
}


class Opened:
    """As much of a ``Model`` as the check asks."""

    as_before = False

    def __init__(self, **options: Any) -> None:
        self.config = config_of("llama", **options)
        self.module = SimpleNamespace(config=self.config)


def moved(kind: str, longest: int) -> float:
    """Largest change of a short document's logits by a document beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", **KINDS[kind])).eval()
    ids_MT = torch.randint(3, 60, (2, longest))
    with torch.no_grad():
        alone = model(ids_MT[:1, :SHORT]).logits
        beside = model(ids_MT).logits[:1, :SHORT]
    return float((alone - beside).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_which_it_matters_is_refused_and_no_other(kind: str) -> None:
    model: Any = Opened(**KINDS[kind])
    how: dict[str, Any] = {"flag": "--data", "change": "--batch_size 1"}
    assert moved(kind, ROOM) < 1e-5 and moved(kind, LONG) > 1e-3
    check_rope(model, ROOM, alone=False, **how)
    with pytest.raises(UserError, match=f"of the kind {kind}.*Set --sequence_length {ROOM} or"):
        check_rope(model, ROOM + 1, alone=False, **how)
    if kind == "longrope":
        check_rope(model, ROOM + 1, alone=True, **how)
        return
    # What an earlier batch was like matters too.
    with pytest.raises(UserError):
        check_rope(model, ROOM + 1, alone=True, **how)


def test_a_run_that_began_before_goes_on_with_a_note(capfd: pytest.CaptureFixture[str]) -> None:
    model: Any = Opened(**KINDS["longrope"])
    model.as_before = True
    check_rope(model, LONG, "--data", alone=False, change="--batch_size 1")
    assert "this run goes on as it began" in capfd.readouterr().out


@pytest.mark.parametrize("options", [{}, rope("linear"), rope("yarn")])
def test_other_kinds_take_any_batch(options: dict[str, Any]) -> None:
    model: Any = Opened(**options)
    check_rope(model, 10**6, "--data", alone=False, change="--batch_size 1")
