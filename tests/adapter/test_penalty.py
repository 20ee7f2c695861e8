"""The orthogonality penalty under ZeRO-3: what its closed form adds to the reduced gradient is what
autograd of the penalty gives on whole tensors in one process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import grid

RANK, WEIGHT = 4, 0.5
LAYOUTS = {
    "one rank": (1, {}),
    "two ranks": (2, {}),
    "accumulation": (2, {"gradient_accumulation_steps": 3}),
    "accumulation and checkpointing": (
        2,
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ),
}


def whole(parts: list[dict[str, Any]], which: int) -> dict[str, Tensor]:
    return {n: torch.cat([part[n][which] for part in parts]) for n in parts[0]}


def squared(a_RI: Tensor, num_matrices: int) -> Tensor:
    return (a_RI @ a_RI.t() - torch.eye(len(a_RI))).square().sum()


def released(a_RI: Tensor, num_matrices: int) -> Tensor:
    return (a_RI @ a_RI.t() - torch.eye(len(a_RI))).norm() / num_matrices


@grid("layout preset", list(LAYOUTS), ["paper", "released"])
def test_the_penalty_adds_its_autograd_gradient_once_a_step(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, layout: str, preset: str
) -> None:
    penalty = {"paper": squared, "released": released}[preset]
    world, options = LAYOUTS[layout]
    gradients = []
    for weight in (WEIGHT, 0.0):
        words = tiny.flags(
            tmp_path / str(weight),
            method="adalora",
            adalora_preset=preset,
            adalora_orthogonality=weight,
            max_steps=4,
            stop_after=1,
            rank=RANK,
            **options,
        )
        parts = ranks(world, "tests.work.penalty:first_gradients", flags=words)
        gradients.append(whole(parts, 2))
        w = whole(parts, 1)
    matrices = [name for name in w if "lambda" not in name]
    assert len(matrices) == 28
    for name in matrices:
        rows = RANK if name.endswith("lora_a") else -1
        t = (w[name].view(rows, RANK) if rows < 0 else w[name].view(RANK, -1)).requires_grad_()
        term = WEIGHT * penalty(t if rows == RANK else t.t(), len(matrices))
        (wanted,) = torch.autograd.grad(term, t)
        added = gradients[0][name] - gradients[1][name]
        # The difference of two sums: as exact as the larger of them.
        scale = float(gradients[0][name].abs().max())
        torch.testing.assert_close(added, wanted.flatten(), rtol=1e-5, atol=3e-6 * scale)
        assert wanted.abs().max() > 1e-3 * scale
    for name in w.keys() - set(matrices):
        assert torch.equal(gradients[0][name], gradients[1][name])
