"""Every torch.distributed call of the package, each with what it costs.

All of them are collectives unless the docstring says otherwise: every rank must call them, in the
same order. On one rank they degenerate to copies; no caller branches on the number of ranks.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.launch import Launch, this_launch
from sparse_lora_dist.launch_mpi import with_meeting_place

traffic_bytes: Counter[str] = Counter()
"""Bytes of tensors this rank received through this module, by collective. DeepSpeed's own exchanges
are not in here, nor are the few objects that are pickled."""

_patient: Any = None
"""A gloo group for waits that may be long: one rank downloads or tokenises, the others have nothing
to do. A peer that dies still ends the wait at once, since its connection closes."""


def start(timeout_minutes: float = 10.0) -> Launch:
    """Join the process group the launcher described, or a group of one without a launcher.

    Raises:
        UserError: the environment contradicts itself, or the ranks cannot meet.
    """
    global _patient
    launch = this_launch()
    if dist.is_initialized():
        return launch
    if launch.launcher == "mpirun" and None in (launch.address, launch.port):
        launch = with_meeting_place(launch)
    if "OMP_NUM_THREADS" not in os.environ:
        # Each rank would otherwise start a thread per core, and they would fight. mpirun and srun
        # may have bound it to a few.
        share = (os.cpu_count() or 1) // launch.local_size
        torch.set_num_threads(max(1, min(share, len(os.sched_getaffinity(0)))))
    device = launch.local_rank
    if on_gpu():
        # srun --gpus-per-task=1 shows each rank one GPU, number 0.
        device %= torch.cuda.device_count()
        torch.cuda.set_device(device)
    os.environ.update(launch.variables(device))  # DeepSpeed reads them
    try:
        _join(launch, timeout_minutes)
    except dist.DistError as error:
        raise UserError(
            f"the ranks cannot meet at {launch.address}:{launch.port}: {error}. If another job on "
            "that machine has the port, give another: --master_port (deepspeed, torchrun), "
            "MASTER_PORT (srun, mpirun). If that is not rank 0's machine as the others know it, "
            "set MASTER_ADDR."
        ) from error
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return launch


def _join(launch: Launch, timeout_minutes: float) -> None:
    # A group of one needs no port, so two runs on a machine cannot collide.
    store = dist.HashStore() if launch.world_size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu() else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def ranks_on_this_machine() -> int:
    """How many ranks this machine has. Not a collective."""
    return this_launch().local_size


def num_nodes() -> int:
    """How many machines the ranks are on."""
    return sum(gather_objects(is_first_on_its_node()))


def on_gpu() -> bool:
    """Do ranks compute on GPUs? As DeepSpeed sees it, whose DS_ACCELERATOR may say cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"


def rank() -> int:
    """This process's number, 0 with no group. Not a collective."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 with no group. Not a collective."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Where this rank computes. Not a collective."""
    if on_gpu():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather_flat(shard: Tensor, numel: int) -> Tensor:
    """Every rank's equal-length 1-D shard in rank order, without the tail padding: ``numel``
    elements.

    Each rank receives ``world_size * len(shard)`` elements.
    """
    out = shard.new_empty(shard.numel() * world_size())
    if world_size() == 1:
        out.copy_(shard)
    else:
        dist.all_gather(list(out.chunk(world_size())), shard.contiguous())
        traffic_bytes["all_gather"] += out.nbytes - shard.nbytes
    return out[:numel]


def sum_over_ranks(t: Tensor) -> Tensor:
    """The elementwise sum of every rank's ``t``, as a new tensor. A ring moves 2x the tensor."""
    return _reduce(t, dist.ReduceOp.SUM)


def max_over_ranks(t: Tensor) -> Tensor:
    """The elementwise maximum of every rank's ``t``, as a new tensor."""
    return _reduce(t, dist.ReduceOp.MAX)


def _reduce(t: Tensor, op: Any) -> Tensor:
    out = t.clone()
    if world_size() > 1:
        dist.all_reduce(out, op=op)
        traffic_bytes["all_reduce"] += 2 * out.nbytes
    return out


def largest(value: int) -> int:
    """The largest of every rank's ``value``. Does not wait for what a GPU has yet to do."""
    if world_size() == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_patient)
    return int(box)


def broadcast(t: Tensor) -> Tensor:
    """Rank 0's ``t`` on every rank, in place."""
    if world_size() > 1:
        dist.broadcast(t, src=0)
        traffic_bytes["broadcast"] += t.nbytes if rank() else 0
    return t


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank, pickled between our own processes. For small things."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank. For small things."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=_patient)
    return box


def is_first_on_its_node() -> bool:
    """Does this rank do what one rank of every node does? Not a collective."""
    return this_launch().local_rank == 0


def barrier() -> None:
    """Nobody goes on before everybody is here."""
    if world_size() > 1:
        dist.barrier(group=_patient)


@contextmanager
def together(phase: str) -> Iterator[None]:
    """If any rank fails inside, all ranks raise, so that none waits for one that is gone.

    Only for phases without collectives of their own: a rank that fails between two of them would
    leave the others waiting inside. Foreign exceptions pass through on the rank that has them, with
    their traceback.
    """
    failure: Exception | None = None
    try:
        yield
    # No space, no permission, a file gone or damaged: the message says it all.
    except (OSError, SafetensorError) as error:
        failure = UserError(f"{phase}: {error}")
    except Exception as error:
        failure = error
    said = gather_objects(str(failure) if failure else None)
    if isinstance(failure, UserError):
        failure.shared = True
    if failure:
        raise failure
    first = next((r for r, text in enumerate(said) if text is not None), None)
    if first is not None:
        raise UserError(f"rank {first} failed while {phase}: {cast(str, said[first])}", shared=True)


@contextmanager
def first_on_its_node() -> Iterator[None]:
    """One rank of every node runs the body first, so that the node's others find what it cached:
    nodes may share no disk. No collectives inside."""
    is_first = is_first_on_its_node()
    if not is_first:
        barrier()
    try:
        yield
    finally:
        if is_first:
            barrier()
