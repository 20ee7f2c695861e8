"""Give the buffers of a model on the meta device their values, such as rotary frequencies.

A meta tensor has no values, so what a module's ``__init__`` computes for its buffers is lost.
transformers computes it again in ``_init_weights``: a sub-model has its own for its modules, and a
module may fill the buffers of its children. A buffer that nothing writes would keep what the memory
held before. Here it is refused.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_lora_dist.errors import UserError

Buffers = dict[str, Tensor]
"""Dict: name of a buffer in the model, such as "rotary_emb.inv_freq" -> the buffer."""
FLAG = "_is_hf_initialized"
"""Attribute that transformers sets on each module that it has initialised, and then passes over."""
MOST_NAMED = 3
"""Largest number of buffers that a message names."""


def fill_buffers(model: PreTrainedModel, *, stored: Collection[str] = ()) -> None:
    """Replace the buffers of a meta model by buffers on the CPU, with the values of transformers.

    Call this function before any parameter is loaded: transformers initialises every parameter that
    is not on the meta device.

    The values are computed twice, each time in memory that holds other values before. A buffer that
    then differs was not written in whole, or was drawn at random.

    Args:
        model: the model on the meta device, which is changed in place.
        stored: names of the tensors of ``model`` that the base files hold. These are read from the
            files later, so no other value is needed.

    Raises:
        UserError: a buffer has no value, neither in the files nor by the model's own code.
    """
    meta = {name: tensor for name, tensor in _buffers(model).items() if tensor.is_meta}
    first = _filled(model, meta, memory=1.0)
    second = _filled(model, meta, memory=math.nan)
    saved = model.state_dict().keys() & set(stored)
    empty = [n for n in meta if n not in saved and not _same(first[n], second[n])]
    if empty:
        others = f" and {len(empty) - MOST_NAMED} more" if len(empty) > MOST_NAMED else ""
        raise UserError(
            f"The base files do not hold {', '.join(empty[:MOST_NAMED])}{others}, and "
            f"{type(model).__name__} does not say what values these buffers have: they would be "
            "whatever the memory of each rank held before. Give a --model whose files hold them."
        )


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move all buffers of a model to ``device``. Its parameters stay where they are."""
    buffers = _buffers(model)
    moved = {id(tensor): tensor.to(device) for tensor in buffers.values()}  # once if shared
    _put(model, {name: moved[id(tensor)] for name, tensor in buffers.items()})


def _filled(model: PreTrainedModel, meta: Buffers, *, memory: float) -> Buffers:
    """Return the buffers that transformers computes in memory that holds ``memory`` everywhere.

    Args:
        model: the model, which gets these buffers.
        meta: its buffers on the meta device.
        memory: 1 or NaN; where a dtype has no NaN, 0 instead.
    """
    tensors = {id(t): _held(t, memory) for t in meta.values()}
    _put(model, {name: tensors[id(tensor)] for name, tensor in meta.items()})
    model.initialize_weights()
    for module in model.modules():
        vars(module).pop(FLAG, None)
    return _buffers(model)


def _held(meta: Tensor, memory: float) -> Tensor:
    has_nan = meta.is_floating_point() or meta.is_complex()
    value = 0.0 if math.isnan(memory) and not has_nan else memory
    return torch.empty_like(meta, device="cpu").fill_(value)


def _buffers(model: nn.Module) -> Buffers:
    return dict(model.named_buffers(remove_duplicate=False))


def _put(model: nn.Module, buffers: Buffers) -> None:
    for name, tensor in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = tensor


def _same(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors have the same bytes: NaN is equal to NaN."""
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)
