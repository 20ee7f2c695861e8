"""Read ranges of the base files ahead, on a thread, while the range before is being used."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Source


class Range(NamedTuple):
    """Elements [start, stop) of a source, flattened."""

    source: Source
    start: int
    stop: int


def read_ahead(
    files: CheckpointFiles, ranges: Iterable[Range], device: torch.device
) -> Iterator[Tensor]:
    """Yield the elements of each range in order. Not collective.

    At most two ranges are held in memory at a time. The thread copies to a GPU on the default
    stream, so use the tensors on that stream.

    Args:
        files: the opened base files.
        ranges: what to read, in this order.
        device: device of the tensors.

    Yields:
        1-D tensor in the dtype of the source.
    """
    with ThreadPoolExecutor(1, initializer=_set_device, initargs=(device,)) as thread:
        reads: deque[Future[Tensor]] = deque()
        for source, start, stop in ranges:
            reads.append(thread.submit(files.read, source, start, stop, device=device))
            if len(reads) > 1:
                # Removed from the queue before it is yielded, so that no reference stays here.
                yield reads.popleft().result()
        while reads:
            yield reads.popleft().result()


def _set_device(device: torch.device) -> None:
    """Set the thread's CUDA device, which is not inherited. Without it the threads of all ranks
    would pin memory for GPU 0, and each would create a context there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
