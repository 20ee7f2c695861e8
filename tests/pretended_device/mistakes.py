"""Mistakes that a GPU would show. Each is planted in a run, and the device must find it."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.pretended_device.modes import Generator
from tests.pretended_device.world import DEFAULT, Stream


def _host_mask() -> None:
    """A mask of the host reaches a shard on the device."""
    from sparse_lora_dist.optim.sparse_adamw import SparseAdamW

    def zero_after_step(self: SparseAdamW, flat: Tensor, mask: Tensor) -> None:
        self._state(flat)["zero"] = mask.to("cpu")

    SparseAdamW.zero_after_step = zero_after_step  # type: ignore[method-assign, assignment]


def _host_generator() -> None:
    """Dropout draws with a generator of the host."""
    torch.Generator = lambda device="cpu": Generator("cpu")  # type: ignore[misc, assignment]


def _no_epilogue() -> None:
    """Gradients are read while they are still reduced."""
    Stream.synchronize = lambda self: None  # type: ignore[method-assign]


def _no_wait_for_gathers() -> None:
    """The stream that computes does not wait for DeepSpeed's gathers."""
    wait_stream = Stream.wait_stream

    def wait(self: Stream, other: Stream) -> None:
        if self is not DEFAULT:
            wait_stream(self, other)

    Stream.wait_stream = wait  # type: ignore[method-assign]


PLANTED: dict[str, Callable[[], None]] = {
    "host mask": _host_mask,
    "host generator": _host_generator,
    "no epilogue": _no_epilogue,
    "no wait for gathers": _no_wait_for_gathers,
}
"""Name of a mistake -> function that plants it in this process."""
