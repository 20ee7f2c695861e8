"""The weights that a sparse method changed, alone: indices and values of every matrix, to be
applied to a model and taken back bit for bit.

Shapes: O out_features, I in_features, L live components, N weights that change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparse_lora_dist.base_model.safetensors_writer import SafetensorsWriter
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import Change

STEM, ABOUT = "sparse_delta", "sparse_delta.json"
ROWS = 512
"""Of a product that stand whole at a time."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Zeros of an update, of all its weights."""

    weights: int
    changed: int
    at_most: int
    """Changed ones by a bound: for pairs that of RoseLoRA's Proposition 1 (arXiv:2406.10777)."""

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
    """``SITE.indices`` (flat, ascending) and ``SITE.values`` (fp32) of every matrix, one after the
    other; how sparse all are together, matrices in which nothing lives counted."""
    changed, at_most, shapes = 0, 0, {}
    out = SafetensorsWriter(folder, stem=STEM)
    try:
        for site, change in trained.changes():
            indices_N, values_N = nonzeros(change)
            small = site.in_features * site.out_features < 2**31
            out.add_tensor(f"{site.name}.indices", indices_N.int() if small else indices_N)
            out.add_tensor(f"{site.name}.values", values_N)
            shapes[site.name] = [site.out_features, site.in_features]
            changed += len(values_N)
            at_most += change.at_most
        out.finish()
    finally:
        out.close()
    about = {"base": trained.base, "shapes": shapes}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    weights = sum(site.in_features * site.out_features for site in trained.sites)
    return Sparsity(weights=weights, changed=changed, at_most=at_most)


def nonzeros(change: Change) -> tuple[Tensor, Tensor]:
    """Flat indices and values of what it changes."""
    indices, values, (num_rows, num_columns) = [], [], change.shape
    for start in range(0, num_rows, ROWS):
        delta = change.rows(start, start + ROWS).flatten()
        (here,) = delta.nonzero(as_tuple=True)
        indices.append(here + start * num_columns)
        values.append(delta[here])
    return torch.cat(indices), torch.cat(values)


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
        UserError: the model has no such linear, or one of another shape; nothing is changed.
    """
    try:
        shapes = json.loads((folder / ABOUT).read_text())["shapes"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no sparse delta: {error}") from error
    for name, shape in shapes.items():  # all, before one is changed
        there = list(_weight(model, name).shape)
        if there != shape:
            raise UserError(f"{name} is {there} in the model; the delta is for {shape}.")
    files = [safe_open(str(p), framework="pt") for p in folder.glob(f"{STEM}-*.safetensors")]
    holder = {key: file for file in files for key in file.keys()}  # noqa: SIM118  no dict
    overwritten = {}
    for name in shapes:
        flat = _weight(model, name).view(-1)
        indices_N, values_N = (
            holder[key].get_tensor(key).to(flat.device)
            for key in (f"{name}.indices", f"{name}.values")
        )
        indices_N = indices_N.long()
        before_N = flat[indices_N]
        overwritten[name] = indices_N, before_N
        flat[indices_N] = (before_N.float() + values_N).to(flat.dtype)
    return Applied(model=model, overwritten=overwritten)


def _weight(model: nn.Module, name: str) -> Tensor:
    try:
        weight = model.get_parameter(f"{name}.weight")
    except AttributeError as error:
        raise UserError(f"the model has no linear {name}. Give the base of the delta.") from error
    if not weight.is_floating_point():
        raise UserError(f"{name} is quantised; a sparse delta needs the weights themselves.")
    return weight.data
