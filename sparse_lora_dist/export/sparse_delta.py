"""Writes the nonzero updates of a run as indices and values, and adds them to a model's weights.

``apply_sparse_delta`` keeps a copy of the weights that it overwrites and of those that it writes,
so that ``Applied.undo`` restores the former bit for bit, and only while the latter are there.

Shapes: N number of entries of one weight matrix that have a nonzero update.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparse_lora_dist.base_model.safetensors_writer import SafetensorsWriter, header_room
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import WeightChange

STEM, ABOUT = "sparse_delta", "sparse_delta.json"
"""STEM: start of the names of the safetensors files. ABOUT: name of the file with the shapes."""
ROWS = 512
"""Number of rows of an update that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How many weights a run's update changes, over all linears with an adapter.

    A weight here is one entry of a weight matrix.
    """

    weights: int
    """Number of weights of all linears with an adapter."""
    changed: int
    """Number of weights with a nonzero update."""
    max_changed: int
    """Upper bound on ``changed`` from the zeros of the factors: see ``LowRank.max_changed``."""

    @property
    def sparsity(self) -> float:
        """Share of weights with a zero update, in [0, 1]."""
        return 1.0 - self.changed / self.weights

    @property
    def bound(self) -> float:
        """Lower bound on ``sparsity``, in [0, 1].

        For a low-rank update B A it is Proposition 1 of RoseLoRA (arXiv:2406.10777): the mean over
        matrices, weighted by size, of max(0, 1 - sum_l (1 - s(A_l)) (1 - s(B_l))). The sum runs
        over the rank-1 components l. s(A_l) is the share of zeros in row l of A, and s(B_l) the
        share of zeros in column l of B.
        """
        return 1.0 - self.max_changed / self.weights


def write_sparse_delta(trained: Trained, folder: Path) -> Sparsity:
    """Write the nonzero updates of a run, one matrix in memory at a time.

    The safetensors files hold two tensors for each linear whose weight has a nonzero update. N is
    the number of entries with a nonzero update, SITE is the linear's name:

        SITE.indices   [N], ascending indices into the flattened weight; int32 if they fit, else
                       int64
        SITE.values    [N], the updates in fp32, with the adapter's scale included

    sparse_delta.json has two keys. "base": name of the base. "shapes": linear's name ->
    [out_features, in_features]. Not collective.

    Args:
        trained: The run. Modules trained in full are left out.
        folder: Existing folder to write into.

    Returns:
        Sparsity over all linears with an adapter, including those without a nonzero update.
    """
    changed, max_changed, shapes = 0, 0, {}
    names = [f"{site.name}.{part}" for site in trained.sites for part in ("indices", "values")]
    out = SafetensorsWriter(folder, header_room(names), stem=STEM)
    try:
        for site, change in trained.changes():
            indices_N, values_N = nonzeros(change)
            small = site.in_features * site.out_features < 2**31
            out.add_tensor(f"{site.name}.indices", indices_N.int() if small else indices_N)
            out.add_tensor(f"{site.name}.values", values_N)
            shapes[site.name] = [site.out_features, site.in_features]
            changed += len(values_N)
            max_changed += change.max_changed
        out.finish()
    finally:
        out.close()
    about = {"base": trained.base, "shapes": shapes}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    weights = sum(site.in_features * site.out_features for site in trained.sites)
    return Sparsity(weights=weights, changed=changed, max_changed=max_changed)


def nonzeros(change: WeightChange) -> tuple[Tensor, Tensor]:
    """Return the nonzero entries of the update of one weight.

    Args:
        change: The update of the weight. Its rows are computed ``ROWS`` at a time.

    Returns:
        (indices [N], values [N]), where N is the number of nonzero entries: ascending int64 indices
        into the flattened weight, and fp32 updates.
    """
    indices, values, (num_rows, num_columns) = [], [], change.shape
    for start in range(0, num_rows, ROWS):
        delta = change.rows(start, start + ROWS).flatten()
        (here,) = delta.nonzero(as_tuple=True)
        indices.append(here + start * num_columns)
        values.append(delta[here])
    return torch.cat(indices), torch.cat(values)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """Handle to undo a sparse delta that was added to a model."""

    model: nn.Module
    """The model that was changed."""
    overwritten: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    """Name of a linear -> (indices into its flattened weight [N], old weights [N], new ones [N]).

    N is the number of overwritten entries. The weights are in the model's dtype.
    """
    untied: Mapping[str, nn.Parameter]
    """Name of a linear whose weight was tied to another parameter -> that parameter."""
    was_tied: bool = True
    """``tie_word_embeddings`` of the model's config before the delta was applied."""

    @torch.no_grad()
    def undo(self) -> None:
        """Restore every overwritten weight, bit for bit, and every tie.

        Raises:
            UserError: These weights were changed since, by another delta, by training or by a cast,
                or this delta is undone already. Nothing is then changed.
        """
        for name, (indices_N, _, after_N) in self.overwritten.items():
            now_N = _weight(self.model, name).view(-1)[indices_N]
            if now_N.dtype != after_N.dtype or not torch.equal(now_N.cpu(), after_N.cpu()):
                raise UserError(
                    f"The delta cannot be undone: {name}.weight was changed since it was applied, "
                    "or it is undone already. Undo later deltas first, the last one first, or load "
                    "the base again."
                )
        for name, (indices_N, before_N, _) in self.overwritten.items():
            _weight(self.model, name).view(-1)[indices_N] = before_N
        for name, shared in self.untied.items():
            _set_weight(self.model, name, shared, is_tied=self.was_tied)


@torch.no_grad()
def apply_sparse_delta(model: nn.Module, folder: str | Path) -> Applied:
    """Add a sparse delta to a model's weights in place.

    Each sum is computed in fp32 and rounded once to the model's dtype. A weight that is tied to
    another parameter is untied: the delta is of the linear alone. Not collective: the weights must
    be whole, not sharded. That they are those of the base is not looked at.

    Args:
        model: The base that the delta was trained over, with floating-point weights.
        folder: Folder written by launcher/export.py --format sparse_delta.

    Returns:
        A handle with a copy of the overwritten weights; its ``undo()`` restores them bit for bit.

    Raises:
        UserError: The folder holds no sparse delta, or a linear of the delta is missing in the
            model, is quantised or offloaded, or has another shape, or the delta is damaged. The
            model is then unchanged.
    """
    if not isinstance(model, nn.Module) or not isinstance(folder, str | Path):
        raise UserError(
            "apply_sparse_delta() takes a model and the path of a folder, got "
            f"{type(model).__name__} and {type(folder).__name__}."
        )
    folder = Path(folder)
    try:
        shapes = dict(json.loads((folder / ABOUT).read_text())["shapes"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder} holds no sparse delta: {ABOUT} cannot be read ({error}). Give a folder that "
            "launcher/export.py wrote with --format sparse_delta."
        ) from error
    for name, shape in shapes.items():  # check all before changing any
        found = list(_weight(model, name).shape)
        if found != shape:
            raise UserError(
                f"{name}.weight has shape {found} in the model, but the sparse delta was made for "
                f"shape {shape}. Load the base model that the delta was trained over."
            )
    changes = _Changes(folder)
    for name in shapes:
        changes.of(name, _weight(model, name).numel())
    overwritten, untied = {}, {}
    was_tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", True))
    for name in shapes:
        if (shared := _shared_weight(model, name)) is not None:
            untied[name] = shared
            _set_weight(model, name, nn.Parameter(shared.clone(), shared.requires_grad))
        flat = _weight(model, name).view(-1)
        indices_N, values_N = (t.to(flat.device) for t in changes.of(name, flat.numel()))
        before_N = flat[indices_N]
        after_N = (before_N.float() + values_N).to(flat.dtype)
        overwritten[name] = indices_N, before_N, after_N
        flat[indices_N] = after_N
    return Applied(model=model, overwritten=overwritten, untied=untied, was_tied=was_tied)


class _Changes:
    """The tensors in the files of a sparse delta."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            paths = sorted(folder.glob(f"{STEM}-*.safetensors"))
            files = [safe_open(str(path), framework="pt") for path in paths]
        except (OSError, SafetensorError) as error:
            raise self._damaged(f"a file cannot be opened ({error})") from error
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def of(self, name: str, numel: int) -> tuple[Tensor, Tensor]:
        """Return indices and values of a linear, whose weight has ``numel`` entries.

        Raises:
            UserError: they are not as ``write_sparse_delta`` writes them.
        """
        try:
            keys = f"{name}.indices", f"{name}.values"
            indices_N, values_N = (self._file_of[key].get_tensor(key) for key in keys)
        except (KeyError, SafetensorError) as error:
            raise self._damaged(f"the change of {name} is missing ({error})") from error
        indices_N = indices_N.long()
        if len(indices_N) != len(values_N) or not values_N.isfinite().all():
            raise self._damaged(f"the change of {name} is not a finite number for each index")
        inside = len(indices_N) == 0 or (indices_N[0] >= 0 and indices_N[-1] < numel)
        if not inside or (indices_N.diff() <= 0).any():
            raise self._damaged(f"the indices of {name} do not ascend within its {numel:,} weights")
        return indices_N, values_N

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"The sparse delta {self.folder} is damaged: {why}. Copy or export it again. The model "
            "is unchanged."
        )


def _shared_weight(model: nn.Module, name: str) -> nn.Parameter | None:
    """Return the weight of linear ``name`` if another module of the model has it too, e.g. as input
    embeddings, which the delta must not change; else None."""
    weight = model.get_parameter(f"{name}.weight")
    named = model.named_parameters(remove_duplicate=False)
    return weight if sum(parameter is weight for _, parameter in named) > 1 else None


def _set_weight(
    model: nn.Module, name: str, weight: nn.Parameter, *, is_tied: bool = False
) -> None:
    model.get_submodule(name).weight = weight
    config = getattr(model, "config", None)
    if config is not None:  # transformers ties weights again when it loads or resizes a model
        config.tie_word_embeddings = is_tied


def _weight(model: nn.Module, name: str) -> Tensor:
    """Return the weight of linear ``name``; raise UserError if it is missing or quantised."""
    try:
        weight = model.get_parameter(f"{name}.weight")
    except AttributeError as error:
        raise UserError(
            f"The model has no linear named {name}, which the sparse delta changes. Load the base "
            "model that the delta was trained over, with the class that README.md beside it shows."
        ) from error
    if weight.is_meta:
        raise UserError(
            f"{name}.weight is in no memory: it is offloaded (device_map), or not loaded yet. Load "
            "the whole model, or export the run with --format merged."
        )
    if not weight.is_floating_point() or weight.itemsize < 2:  # 8 bits hold codes, to be scaled
        raise UserError(
            f"{name}.weight is quantised, but a sparse delta can only be added to floating-point "
            "weights. Load the model without quantisation."
        )
    if not weight.is_contiguous():
        raise UserError(
            f"{name}.weight is not contiguous in memory. Replace it by its .contiguous() copy."
        )
    return weight.data
