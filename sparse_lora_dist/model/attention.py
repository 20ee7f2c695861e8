"""Choose the attention of a run, before anything is loaded: ``tasks/packed_attention.py`` where it
fits the options, the device and the model. A copy of the model without its weights (``stand_in``)
tells what it is like: no list of architectures does."""

from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparse_lora_dist.base_model.architecture import PRECISIONS
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import VARLEN
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import TOKENS, TOO_LARGE, inputs_of
from sparse_lora_dist.model.stand_in import CPU, stand_in
from sparse_lora_dist.tasks.packed_attention import DTYPES, Sizes, packed, why_no_kernel

OTHER = "this {} model does not compute its attention in transformers' usual way"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a model can have the attention ``VARLEN``."""

    sizes: frozenset[Sizes] = frozenset()
    """Sizes of the layers that it computes; empty if it can compute none."""
    reason: str = ""
    """Why it cannot be used."""


def settle_attention(config: Config, model: PreTrainedModel) -> str:
    """Give a model the attention ``VARLEN`` if it was asked for, or nothing was and it can be used.
    Collective.

    Args:
        config: options of the run.
        model: model on the meta device; its attention may be changed.

    Returns:
        A note why packed documents are told apart by a mask on this GPU; "" if there is none.

    Raises:
        UserError: ``--attn_implementation varlen`` was given and cannot be used.
    """
    asked = config.model.attn_implementation
    if asked not in (None, VARLEN):
        return ""
    barred = reason = barred_by_options(config, on_gpu=comm.on_gpu())
    if not barred:
        fit: Fit = comm.broadcast_object(fit_of(model) if comm.rank() == 0 else None)
        reason = fit.reason or _why_no_kernel(config, fit)
    if not reason:
        model.set_attn_implementation(VARLEN)
    elif asked == VARLEN:
        raise refusal(reason)
    return f"packed documents are told apart by a mask: {reason}" if reason and not barred else ""


def plan_attention(config: Config, model: PreTrainedModel, *, on_gpu: bool) -> None:
    """Give a model the attention that it would have in a run on usual GPUs. Not a collective.

    Args:
        config: options of the run.
        model: model on the meta device; its attention may be changed.
        on_gpu: True if the ranks would compute on GPUs.

    Raises:
        UserError: ``--attn_implementation varlen`` was given and cannot be used.
    """
    asked = config.model.attn_implementation
    if asked not in (None, VARLEN):
        return
    reason = barred_by_options(config, on_gpu=on_gpu) or fit_of(model).reason
    if not reason:
        model.set_attn_implementation(VARLEN)
    elif asked == VARLEN:
        raise refusal(reason)


def refusal(reason: str) -> UserError:
    """Return the error for ``--attn_implementation varlen`` where it cannot be used."""
    return UserError(
        f"--attn_implementation {VARLEN} cannot be used: {reason}. Leave it out, and the attention "
        "is chosen for the model.",
        shared=True,
    )


def barred_by_options(config: Config, *, on_gpu: bool) -> str:
    """Return why no model can have the attention ``VARLEN`` with these options; "" if one can.

    Args:
        config: options of the run.
        on_gpu: True if the ranks compute on GPUs.
    """
    if config.model.task != "causal_lm":
        return f"it is for packed documents, and --task {config.model.task} has none"
    if not on_gpu:
        return "its kernel needs a GPU, and this run is on the CPU"
    if PRECISIONS[config.model.precision] not in DTYPES:
        return f"its kernel takes bf16, and --precision is {config.model.precision}"
    return ""


def fit_of(model: PreTrainedModel) -> Fit:
    """Return whether the attention ``VARLEN`` fits a causal language model. Not a collective.

    A copy of the model runs two rows of two documents with sdpa, and with ``VARLEN``, whose layers
    then take the mask that follows from the documents and their own window. Logits must be equal.

    Args:
        model: model on the meta device, with its usual attention; it is not changed.
    """
    usual = model.config.get_text_config()._attn_implementation
    if usual != "sdpa":
        kind = model.config.model_type
        return Fit(reason=f"the attention of this {kind} model is {usual}, which is not replaced")
    other = OTHER.format(model.config.model_type)
    with suppress(Exception), torch.no_grad():  # code of any architecture
        few = stand_in(model)
        text = few.config.get_text_config()
        if getattr(text, "sliding_window", None):
            text.sliding_window = TOKENS // 2  # a window that these documents exceed
        inputs = inputs_of(few, "causal_lm")
        expected = few(**inputs).logits
        few.set_attn_implementation(VARLEN)
        with packed(inputs["position_ids"], CPU) as documents:
            logits = few(**inputs).logits
        if not documents.sizes:
            return Fit(reason="; ".join(sorted(documents.reasons)) or other)
        if bool((logits - expected).abs().max() <= TOO_LARGE * expected.abs().max()):
            return Fit(sizes=frozenset(documents.sizes))
    return Fit(reason=other)


def _why_no_kernel(config: Config, fit: Fit) -> str:
    """Return why the kernel cannot run on some rank; "" if it runs on all. Collective."""
    dtype, device = PRECISIONS[config.model.precision], comm.device()
    found = [why_no_kernel(sizes, dtype, device) for sizes in sorted(fit.sizes)]
    everyone = comm.gather_objects(next(filter(None, found), None))
    return next((f"its kernel cannot run here ({why})" for why in everyone if why), "")
