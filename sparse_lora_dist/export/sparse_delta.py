"""The weights that a sparse method changed, alone: indices and values of every matrix, to be
applied to a model and taken back bit for bit.

Shapes: O out_features, I in_features, L live pieces, N weights that change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import Pair
from sparse_lora_dist.export.trained import Trained

FILE = "sparse_delta.safetensors"
ROWS = 512
"""Of a product that stand whole at a time."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Zeros of an update, of all its weights."""

    weights: int
    changed: int
    at_most: float
    """Changed ones by the bound of RoseLoRA's Proposition 1 (arXiv:2406.10777)."""

    @property
    def zeros(self) -> float:
        """Share of weights that stay."""
        return 1.0 - self.changed / self.weights

    @property
    def bound(self) -> float:
        """Share that stays at least: the mean of max(0, 1 - sum_l (1 - s(A_l)) (1 - s(B_l))) with
        s the share of zeros in a row of A, in a column of B, weighted by the matrices' sizes."""
        return 1.0 - self.at_most / self.weights


def write_sparse_delta(trained: Trained, folder: Path) -> Sparsity:
    """``SITE.indices`` (flat, ascending) and ``SITE.values`` (fp32) of every matrix; how sparse all
    are together, matrices in which nothing lives counted."""
    tensors: dict[str, Tensor] = {}
    scale = trained.config.adapter.alpha / trained.config.adapter.rank
    at_most = 0.0
    for name, pair in trained.pairs():
        indices_N, values_N = nonzeros(pair, scale)
        tensors |= {f"{name}.indices": indices_N, f"{name}.values": values_N}
        at_most += most_changed(pair)
    changed = sum(len(t) for name, t in tensors.items() if name.endswith(".values"))
    about = {"base": trained.base, "identity": trained.manifest["description"]["base"]}
    save_file(tensors, folder / FILE, metadata={k: json.dumps(v) for k, v in about.items()})
    weights = sum(site.in_features * site.out_features for site in trained.sites)
    return Sparsity(weights=weights, changed=changed, at_most=at_most)


def nonzeros(pair: Pair, scale: float) -> tuple[Tensor, Tensor]:
    """Flat indices and values of what ``scale * B A`` changes."""
    (a_LI, b_OL), indices, values = pair, [], []
    for start in range(0, len(b_OL), ROWS):
        delta = (b_OL[start : start + ROWS] @ a_LI * scale).flatten()
        (here,) = delta.nonzero(as_tuple=True)
        indices.append(here + start * a_LI.shape[1])
        values.append(delta[here])
    return torch.cat(indices), torch.cat(values)


def most_changed(pair: Pair) -> float:
    """Weights of a matrix that its pieces can change at most: of each the outer product of what
    lives in its row of A and its column of B, no two of them in one place."""
    a_LI, b_OL = pair
    together = ((a_LI != 0).sum(1) * (b_OL != 0).sum(0)).sum()
    return float(min(int(together), a_LI.shape[1] * len(b_OL)))


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What was overwritten, so that it can be put back."""

    model: nn.Module
    overwritten: Mapping[str, tuple[Tensor, Tensor]]
    """Site -> its flat indices and the weights that were there, in the model's dtype."""

    @torch.no_grad()
    def undo(self) -> None:
        """Every weight as it was, bit for bit."""
        for name, (indices_N, before_N) in self.overwritten.items():
            _weight(self.model, name).view(-1)[indices_N] = before_N


@torch.no_grad()
def apply_sparse_delta(model: nn.Module, folder: Path) -> Applied:
    """Add the delta of ``folder`` to the weights of ``model``: each sum in fp32, rounded once.

    Raises:
        UserError: the model has no such linear, or one of another shape.
    """
    overwritten = {}
    with safe_open(str(folder / FILE), framework="pt") as file:
        names = [key.removesuffix(".values") for key in file.keys() if key.endswith(".values")]  # noqa: SIM118
        deltas = {
            n: (file.get_tensor(f"{n}.indices"), file.get_tensor(f"{n}.values")) for n in names
        }
    for name, (indices_N, _) in deltas.items():  # all, before one is changed
        if len(indices_N) and int(indices_N[-1]) >= _weight(model, name).numel():
            raise UserError(
                f"{folder}: {name} is larger than the model's. Give the base it is for."
            )
    for name, (indices_N, values_N) in deltas.items():
        flat = _weight(model, name).view(-1)
        indices_N = indices_N.to(flat.device)
        before_N = flat[indices_N]
        overwritten[name] = indices_N, before_N
        flat[indices_N] = (before_N.float() + values_N.to(flat.device)).to(flat.dtype)
    return Applied(model=model, overwritten=overwritten)


def _weight(model: nn.Module, name: str) -> Tensor:
    try:
        weight = model.get_parameter(f"{name}.weight")
    except AttributeError as error:
        raise UserError(f"the model has no linear {name}. Give the base of the delta.") from error
    if not weight.is_floating_point():
        raise UserError(f"{name} is quantised; a sparse delta needs the weights themselves.")
    return weight.data
