"""The trained adapter as PEFT reads it: a plain LoRA of the components that live.

Shapes: R rank of a site, Q its components that are computed, L those that do something, I
in_features, O out_features.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.peft_config import APART, PREFIX, WEIGHTS
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.atomic_files import replace_whole
from sparse_lora_dist.zero3.parameters import gathered


class NothingLives(UserError):
    """Every component of every adapter is zero."""

    def __init__(self) -> None:
        super().__init__(
            "nothing of any adapter lives, so there is no LoRA to write. "
            "Prune less, or train longer or at a higher --learning_rate.",
            shared=True,
        )


class NoPair(UserError):
    """The method's updates are no low-rank pairs."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"what --method {method} adds to a weight is no low-rank pair, so there is no LoRA of "
            "it: launcher/export.py has --format merged, and sparse_delta for what is sparse.",
            shared=True,
        )


Pair = tuple[Tensor, Tensor]
"""(a_LI, b_OL) of a plain LoRA that is scaled by alpha / R."""


@dataclass(frozen=True, kw_only=True)
class ForPeft:
    """What PEFT's two files say, of whatever type."""

    full: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters of modules trained in full, as the model names them."""
    full_modules: Sequence[str] = ()
    base: str
    """Hub id or folder."""
    revision: str | None = None
    """Of a hub id."""
    task_type: str
    classes: Sequence[str] = ()
    """Of a classifier; they go into id2label.json, which PEFT has no place for."""


@dataclass(frozen=True, kw_only=True)
class PlainLora(ForPeft):
    """Of a LoRA."""

    pairs: Mapping[str, Pair]
    """By site; one in which nothing lives is left out."""
    rank: int
    alpha: float
    dropout: float


def save_peft(
    folder: Path,
    adapters: Sequence[AdapterLinear],
    saved_modules: Mapping[str, nn.Module],
    base: str,
    *,
    revision: str | None,
    task_type: str,
    classes: Sequence[str],
) -> int:
    """Write adapter_config.json and adapter_model.safetensors; return the bytes of the latter.
    Collective.

    ``peft.PeftModel.from_pretrained(base, folder)`` gives the trained logits. One module at a time
    is gathered.

    Raises:
        NothingLives: there is no component to write.
        NoPair: a component is no LoRA.
    """
    pairs: dict[str, Pair] = {}
    full: dict[str, Tensor] = {}
    if any(adapter.form.to_lora is None for adapter in adapters):
        raise NoPair(adapters[0].method.name)
    for adapter in adapters:
        parameters = [getattr(adapter, name) for name in adapter.specs]
        kept = [getattr(adapter, key) for key in adapter.form.kept]
        read = list(adapter.base.parameters()) if adapter.form.reads_base else []
        with gathered([*parameters, *kept, *read]):
            if comm.rank() == 0:
                pair = live_pair(adapter, [p.data for p in parameters])
                pairs |= {adapter.site.name: (_copy(pair[0]), _copy(pair[1]))} if pair else {}
    for name, module in saved_modules.items():
        with gathered(module.parameters()):
            if comm.rank() == 0:
                full |= {f"{name}.{k}": _copy(p) for k, p in module.named_parameters()}
    if not any(comm.gather_objects(bool(pairs))):
        raise NothingLives
    with fail_together(f"writing {folder}"):
        if comm.rank() == 0:
            first = adapters[0]
            trained = PlainLora(
                pairs=pairs,
                full=full,
                full_modules=list(saved_modules),
                rank=first.site.rank,
                alpha=first.alpha,
                dropout=first.dropout,
                base=base,
                revision=revision,
                task_type=task_type,
                classes=classes,
            )
            return replace_whole(folder, partial(write_peft, trained=trained))
    return 0


def write_peft(folder: Path, trained: PlainLora, *, uniform: bool = False) -> int:
    """The same from what is at hand.

    Args:
        uniform: for servers that know one rank and no ``modules_to_save``: components of zeros up
        to
            the largest rank, the scale in B, modules trained in full in a file of their own.

    Raises:
        NothingLives: there is no component to write.
    """
    if not trained.pairs:
        raise NothingLives
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: len(a_LI) for name, (a_LI, _) in trained.pairs.items()}
    each = trained.alpha / trained.rank
    pairs, apart = trained.pairs, dict(trained.full)
    if uniform:
        pairs = {name: _padded(pair, max(ranks.values()), each) for name, pair in pairs.items()}
    tensors = {}
    for name, (a_LI, b_OL) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a_LI
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b_OL
    if uniform and apart:
        save_file(apart, folder / APART, metadata={"format": "pt"})
    elif apart:
        tensors |= {f"{PREFIX}{name}": t for name, t in apart.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _peft_config(trained, ranks, uniform).save_pretrained(str(folder))
    write_labels(folder, trained.classes)
    return (folder / WEIGHTS).stat().st_size


def write_labels(folder: Path, classes: Sequence[str]) -> None:
    """Names of a classifier's classes, which PEFT has no place for."""
    if classes:
        names = json.dumps(dict(enumerate(classes)), indent=1)
        (folder / "id2label.json").write_text(names + "\n")


def _peft_config(trained: PlainLora, ranks: Mapping[str, int], uniform: bool) -> LoraConfig:
    usual, alpha = trained.rank, trained.alpha
    if uniform:
        usual, alpha = max(ranks.values()), max(ranks.values())  # a scale of 1
    others = {} if uniform else {name: r for name, r in ranks.items() if r != usual}
    return LoraConfig(
        task_type=trained.task_type,
        base_model_name_or_path=trained.base,
        revision=trained.revision,
        inference_mode=True,
        r=usual,
        # Annotated int by PEFT, which divides it like any number.
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=trained.dropout,
        # Whole names: an ending might match a linear that has no adapter.
        target_modules=list(ranks),
        rank_pattern=others,
        # Components are scaled by alpha / R, however many live.
        alpha_pattern={name: alpha * r / usual for name, r in others.items()},
        modules_to_save=None if uniform else list(trained.full_modules) or None,
    )


def _padded(pair: Pair, rank: int, scale: float) -> Pair:
    (a_LI, b_OL), live = pair, len(pair[0])
    a_RI, b_OR = a_LI.new_zeros(rank, a_LI.shape[1]), b_OL.new_zeros(len(b_OL), rank)
    a_RI[:live], b_OR[:, :live] = a_LI, b_OL * scale
    return a_RI, b_OR


def live_pair(adapter: AdapterLinear, tensors: Sequence[Tensor]) -> Pair | None:
    """The components that do something; None where there is none."""
    a_RI, b_OR = plain_pair(adapter, tensors)
    lives_R = (a_RI != 0).any(1) & (b_OR != 0).any(0)
    return (a_RI[lives_R], b_OR[:, lives_R]) if lives_R.any() else None


def plain_pair(adapter: AdapterLinear, tensors: Sequence[Tensor]) -> Pair:
    """(a_RI, b_OR) of the plain LoRA, scaled by alpha / --rank, that gives the adapter's delta;
    zero in the components that it does not compute.

    Raises:
        NoPair: there is none.
    """
    if adapter.form.to_lora is None:
        raise NoPair(adapter.method.name)
    a_QI, b_OQ = adapter.form.to_lora(adapter.computed(tensors))
    rescale = adapter.scale / (adapter.alpha / adapter.site.rank)
    b_OQ = b_OQ if rescale == 1.0 else b_OQ * rescale
    if len(adapter.components.computed) == adapter.num_components:
        return a_QI, b_OQ
    places = torch.tensor(adapter.components.computed, dtype=torch.int64, device=a_QI.device)
    a_RI = a_QI.new_zeros(adapter.num_components, a_QI.shape[1]).index_copy_(0, places, a_QI)
    b_OR = b_OQ.new_zeros(b_OQ.shape[0], adapter.num_components).index_copy_(1, places, b_OQ)
    return a_RI, b_OR


def _copy(t: Tensor) -> Tensor:
    return t.detach().cpu().clone().contiguous()
