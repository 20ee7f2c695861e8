"""Ranges of a checkpoint in a fixed order, each read on a thread while the one before is used."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Source


class Range(NamedTuple):
    """Elements [start, stop) of a source."""

    source: Source
    start: int
    stop: int


def read_ahead(
    files: CheckpointFiles, ranges: Iterable[Range], device: torch.device
) -> Iterator[Tensor]:
    """The elements of each range, 1-D, on ``device``: at most two ranges are held at a time.

    The thread copies to a GPU on the default stream, so this is to be used on that stream.
    """
    with ThreadPoolExecutor(1, initializer=_use, initargs=(device,)) as thread:
        reads: deque[Future[Tensor]] = deque()
        for source, start, stop in ranges:
            reads.append(thread.submit(files.read, source, start, stop, device=device))
            if len(reads) > 1:
                # Taken out of the queue before it is handed out, so that nothing here keeps it.
                yield reads.popleft().result()
        while reads:
            yield reads.popleft().result()


def _use(device: torch.device) -> None:
    """CUDA's current device is each thread's own; without this the threads of all ranks would pin
    memory in the name of GPU 0, and each leave a context there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
