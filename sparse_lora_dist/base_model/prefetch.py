"""Read ranges of the base model's files on a thread, each while the previous one is processed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Source


class Range(NamedTuple):
    """Elements [start, stop) of a flattened parameter, which the files hold at ``source``."""

    source: Source
    start: int
    stop: int


def read_ahead(
    files: CheckpointFiles, ranges: Iterable[Range], device: torch.device
) -> Iterator[Tensor]:
    """Yield the elements of each range, and read the next range meanwhile. Not collective.

    At most two ranges are held in memory at a time. The thread copies to a GPU on the default
    stream, so use the tensors on that stream.

    Args:
        files: the opened safetensors files of the base model.
        ranges: ranges to read, in the order in which they are yielded.
        device: device of the tensors.

    Yields:
        1-D tensor for each range, in the dtype of its source (``Source.dtype``).
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
    """Set the CUDA device of the reading thread, which does not inherit it.

    Without this the threads of all ranks would pin memory for GPU 0, and each would create a CUDA
    context there.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
