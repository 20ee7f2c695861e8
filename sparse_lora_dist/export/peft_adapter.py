"""Writes a trained adapter in PEFT's LoRA format.

A "site" is a linear with an adapter (PEFT: target module). A "component" is a rank-1 component: row
i of A with column i of B. Only components with a nonzero update are written, so sites may have
different ranks.

Shapes: R number of components of a site, Q of those that forward computes, L of those with a
nonzero update, I in_features, O out_features.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.peft_agrees import name_for_peft
from sparse_lora_dist.adapter.peft_config import APART, LABELS, PREFIX, WEIGHTS
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.model.prompting import Prompting
from sparse_lora_dist.model.saved_class import SavedClass
from sparse_lora_dist.system.tensor_files import save_file
from sparse_lora_dist.system.whole_folders import replace_whole
from sparse_lora_dist.zero3.parameters import gathered


class NothingLives(UserError):
    """Raised if every component of every adapter has a zero update."""

    def __init__(self) -> None:
        super().__init__(
            "no component of any adapter has a nonzero update, so there is no LoRA to write. "
            "If steps were left out (bad_steps.jsonl), see what made their loss or gradient not "
            "finite; otherwise prune less, train longer or set a higher --learning_rate.",
            shared=True,
        )


class NoPair(UserError):
    """Raised if the method's update is not a low-rank product B A."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"The update that --method {method} adds to a weight is not a low-rank product B A, so "
            "it cannot be written as a LoRA. Use launcher/export.py with --format merged, or with "
            "--format sparse_delta if the update is sparse.",
            shared=True,
        )


Pair = tuple[Tensor, Tensor]
"""(a_LI, b_OL), the factors A [L, I] and B [O, L] of a plain LoRA.

delta W = alpha / rank * B A, where rank is the run's --rank, not L.
"""


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """Content of a PEFT adapter folder that does not depend on the adapter type."""

    full: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name in the model -> weight, for the modules trained in full."""
    full_modules: Sequence[str] = ()
    """Names of the modules trained in full (PEFT: ``modules_to_save``)."""
    base: str
    """Hub id or folder of the base model."""
    revision: str | None = None
    """Revision of the base model on the hub."""
    task_type: str
    """PEFT's task type, e.g. CAUSAL_LM."""
    classes: Sequence[str] = ()
    """Class names of a classifier; empty for a language model.

    They are written to id2label.json, because PEFT's config has no field for them.
    """
    prompting: Prompting | None = None
    """How the model is prompted and where its answers end; None if that is not known."""
    saved_class: SavedClass | None = None
    """Class that the base's config.json names, if the run's model is of another one."""

    def named(self, name: str) -> str:
        """Return the name of a module or parameter in the class that config.json names."""
        return name if self.saved_class is None else self.saved_class.named(name)

    @property
    def modules_to_save(self) -> list[str] | None:
        """Value of PEFT's ``modules_to_save``; None if no module was trained in full."""
        names = map(self.named, self.full_modules)
        return [name_for_peft(name, self.task_type) for name in names] or None

    def write_beside(self, folder: Path) -> None:
        """Write into the adapter's folder what PEFT's config has no fields for: class names, chat
        template and the tokens that end an answer.

        The tokenizer is not among them: with a tokenizer beside the adapter, some versions of PEFT
        change the size of the base's embeddings.
        """
        if self.classes:
            names = json.dumps(dict(enumerate(self.classes)), indent=1)
            (folder / LABELS).write_text(names + "\n")
        if self.prompting is not None:
            self.prompting.write(folder)


@dataclass(frozen=True, kw_only=True)
class PlainLora(PeftAdapter):
    """Content of a PEFT LoRA folder."""

    pairs: Mapping[str, Pair]
    """Site name -> (A, B); sites without a nonzero update are left out."""
    rank: int
    """--rank of the run.

    Every pair is scaled by alpha / rank, even if its own rank (the number of rows of A) differs.
    """
    alpha: float
    """LoRA alpha of the run."""
    dropout: float
    """LoRA dropout of the run, written to the config."""


def save_peft(
    folder: Path,
    adapters: Sequence[AdapterLinear],
    saved_modules: Mapping[str, nn.Module],
    about: PeftAdapter,
) -> int:
    """Gather a sharded adapter and write it as a PEFT LoRA. Collective.

    To be called at the end of training. ``peft.PeftModel.from_pretrained(base, folder)`` then
    computes the same logits as the trained model. One module is gathered at a time, and rank 0
    writes.

    Args:
        folder: Folder to write. An existing one is replaced as a whole.
        adapters: All adapters of the model.
        saved_modules: Module name -> module, for the modules trained in full.
        about: What does not depend on the adapter type, without the weights of ``saved_modules``.

    Returns:
        Size of adapter_model.safetensors in bytes on rank 0; 0 on other ranks.

    Raises:
        NothingLives: No component has a nonzero update, and no module was trained in full. Raised
            on every rank.
        NoPair: The method's update is not a low-rank product. Raised on every rank.
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
    if not saved_modules and not any(comm.gather_objects(bool(pairs))):
        raise NothingLives
    with fail_together(f"writing {folder}", may_pass=True):
        if comm.rank() == 0:
            first = adapters[0]
            own = {"full": full, "full_modules": list(saved_modules)}
            trained = PlainLora(
                **vars(about) | own,
                pairs=pairs or {first.site.name: no_update(first.site)},
                rank=first.site.rank,
                alpha=first.alpha,
                dropout=first.dropout,
            )
            write = partial(write_peft, trained=trained)
            return replace_whole(folder, write, partial(print_line, "warning"))
    return 0


def no_update(site: Site) -> Pair:
    """Return factors of one component whose update is zero.

    PEFT opens no LoRA without target modules, also where modules trained in full are all there is.
    """
    return torch.zeros(1, site.in_features), torch.zeros(site.out_features, 1)


def write_peft(folder: Path, trained: PlainLora, *, uniform: bool = False) -> int:
    """Write a LoRA that is whole and in memory in PEFT's format. Not collective.

    The files are adapter_config.json, adapter_model.safetensors and those of ``write_beside``.

    Args:
        folder: Folder to write into; created if it is missing.
        trained: The adapter.
        uniform: True: write for servers (vLLM) that accept only one rank and no
            ``modules_to_save``. Every pair is padded with zeros to the largest rank, the scale is
            multiplied into B, and modules trained in full are written to
            modules_to_save.safetensors. False: each site keeps its own rank, and modules trained in
            full are PEFT's ``modules_to_save``.

    Returns:
        Size of adapter_model.safetensors in bytes.

    Raises:
        NothingLives: No component has a nonzero update.
    """
    if not trained.pairs:
        raise NothingLives
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {trained.named(name): pair for name, pair in trained.pairs.items()}
    ranks = {name: len(a_LI) for name, (a_LI, _) in pairs.items()}
    scale = trained.alpha / trained.rank
    full = {trained.named(name): t for name, t in trained.full.items()}
    if uniform:
        pairs = {name: _padded(pair, max(ranks.values()), scale) for name, pair in pairs.items()}
    tensors = {}
    for name, (a_LI, b_OL) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a_LI
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b_OL
    if uniform and full:
        save_file(full, folder / APART, metadata={"format": "pt"})
    elif full:
        tensors |= {f"{PREFIX}{name}": t for name, t in full.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _peft_config(trained, ranks, uniform).save_pretrained(str(folder))
    trained.write_beside(folder)
    return (folder / WEIGHTS).stat().st_size


def _peft_config(trained: PlainLora, ranks: Mapping[str, int], uniform: bool) -> LoraConfig:
    rank, alpha = trained.rank, trained.alpha
    if uniform:
        rank, alpha = max(ranks.values()), max(ranks.values())  # alpha / rank is 1
    others = {} if uniform else {name: r for name, r in ranks.items() if r != rank}
    return LoraConfig(
        task_type=trained.task_type,
        base_model_name_or_path=trained.base,
        revision=trained.revision,
        inference_mode=True,
        r=rank,
        # PEFT annotates it as int, but any number works: it is only divided.
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=trained.dropout,
        # Full names: PEFT matches suffixes, which may fit a linear without an adapter.
        target_modules=list(ranks),
        rank_pattern=others,
        # PEFT scales by alpha / r, r the rank of the module. Ours scales by alpha / --rank.
        alpha_pattern={name: alpha * r / rank for name, r in others.items()},
        modules_to_save=None if uniform else trained.modules_to_save,
    )


def _padded(pair: Pair, rank: int, scale: float) -> Pair:
    (a_LI, b_OL), live = pair, len(pair[0])
    a_RI, b_OR = a_LI.new_zeros(rank, a_LI.shape[1]), b_OL.new_zeros(len(b_OL), rank)
    a_RI[:live], b_OR[:, :live] = a_LI, b_OL * scale
    return a_RI, b_OR


def live_pair(adapter: AdapterLinear, tensors: Sequence[Tensor]) -> Pair | None:
    """Return the plain LoRA of a site's adapter, of the components with a nonzero update only.

    Not collective.

    Args:
        adapter: The adapter of one site.
        tensors: The site's trained tensors, gathered, in the order of ``adapter.specs``.

    Returns:
        (A [L, I], B [O, L]), to be scaled by alpha / --rank, where L is the number of components
        with a nonzero update; None if L is 0.

    Raises:
        NoPair: The method's update is not a low-rank product.
    """
    a_RI, b_OR = plain_pair(adapter, tensors)
    lives_R = (a_RI != 0).any(1) & (b_OR != 0).any(0)
    return (a_RI[lives_R], b_OR[:, lives_R]) if lives_R.any() else None


def plain_pair(adapter: AdapterLinear, tensors: Sequence[Tensor]) -> Pair:
    """Return the plain LoRA of a site's adapter, of all its components.

    Not collective.

    Args:
        adapter: The adapter of one site.
        tensors: The site's trained tensors, gathered, in the order of ``adapter.specs``.

    Returns:
        (A [R, I], B [O, R]), to be scaled by alpha / --rank, where R is the number of components.
        Components that forward does not compute are zero.

    Raises:
        NoPair: The method's update is not a low-rank product.
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
