"""Make a copy of a model that runs like it and needs neither its weights nor their memory.

The copy has the modules of the model, its buffers, and parameters of random values. All entries of
a parameter are views of a few numbers, so the copy of a model of 70 billion parameters takes a few
megabytes. Linears and experts, which treat each token by itself, are replaced by cheap functions
that do so too. What a model does between tokens is left as it is: attention, masks, positions,
convolutions, recurrences.

Letters at the end of names: I in_features, O out_features.
"""

import copy
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_lora_dist.base_model.buffers import fill_buffers
from sparse_lora_dist.base_model.shard_loader import is_experts
from sparse_lora_dist.config.sections import VARLEN

CPU = torch.device("cpu")


def stand_in(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that runs on the CPU at almost no cost, in fp32 and eval mode.

    Not a collective. torch's global random generator is left as it is.

    Args:
        model: model on the meta device; it is not changed.

    Raises:
        Exception: whatever the model's own code raises where it cannot be copied.
    """
    with torch.random.fork_rng(devices=[]):
        few: PreTrainedModel = copy.deepcopy(model).float().eval()
        if few.config._attn_implementation not in ("sdpa", "eager", VARLEN):
            few.set_attn_implementation("eager")  # kernels of GPUs
        _fill_buffers(few)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, module in few.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = _few_numbers(f"{name}.{leaf}", parameter)
            setattr(module, leaf, made[id(parameter)])
        if isinstance(module, nn.Linear):
            setattr(module, "forward", _token_by_token(name, module))  # noqa: B010
        elif is_experts(module):
            module.forward = lambda x, *routed, **named: x
    return few


def _fill_buffers(model: PreTrainedModel) -> None:
    """Fill the model's buffers, and those that only the base's files can fill with any numbers."""
    with suppress(Exception):  # code of any architecture; what it does not fill is NaN
        fill_buffers(model)
    for name, module in model.named_modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta or bool(buffer.isnan().any()):
                numbers = 0.5 + torch.rand(buffer.shape, generator=_generator(f"{name}.{leaf}")) / 2
                module._buffers[leaf] = numbers.to(buffer.dtype)


def _few_numbers(name: str, parameter: Tensor) -> nn.Parameter:
    """Return a parameter of the same shape whose entries are views of a few random numbers.

    Entry [i, j, ...] is number i + j + ... Numbers of vectors are positive, as they scale or decay.
    """
    shape = tuple(parameter.shape)
    count = sum(shape) - len(shape) + 1 if all(shape) else 0
    numbers = torch.rand(count, generator=_generator(name))
    numbers = 0.5 + numbers / 2 if len(shape) < 2 else (2 * numbers - 1) / shape[-1] ** 0.5
    return nn.Parameter(numbers.as_strided(shape, (1,) * len(shape)), requires_grad=False)


def _token_by_token(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return a function in place of a linear's forward: each output is the difference of two
    inputs, with a factor. Both are drawn by the linear's name."""

    def forward(x_TI: Tensor, *rest: Any) -> Tensor:
        draw, size = _generator(name), linear.out_features
        apart = int(torch.randint(1, max(2, x_TI.shape[-1]), (1,), generator=draw))
        repeats = -(-(size + apart) // x_TI.shape[-1])
        x = x_TI.repeat(*[1] * (x_TI.dim() - 1), repeats)
        factor_O = torch.rand(size, generator=draw).sub_(0.5).to(x.dtype)
        return (x[..., :size] - x[..., apart : apart + size] / 2) * (2 * factor_O)

    return forward


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
