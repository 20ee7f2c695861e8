"""Every torch.distributed call of the package, each with what it costs.

All of them are collectives unless the docstring says otherwise: every rank must call them, in the
same order. On one rank they degenerate to copies; no caller branches on the number of ranks.
"""

import os
import socket
import time
from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sparse_lora_dist.distributed.launch import Launch, this_launch
from sparse_lora_dist.distributed.launch_mpi import with_meeting_place
from sparse_lora_dist.errors import UserError

traffic_bytes: Counter[str] = Counter()
"""Bytes of tensors this rank received through this module, by collective. DeepSpeed's own exchanges
are not in here, nor are the few objects that are pickled."""

_patient: Any = None
"""A gloo group for waits that may be long: one rank downloads or tokenises, the others have nothing
to do. A peer that dies still ends the wait at once, since its connection closes."""

last_collective = "none"
"""The last one of this module that this rank entered. DeepSpeed's have a number only."""

SPARE = timedelta(seconds=60)
"""The groups' own timeout comes so much later than ``watch.py``'s: NCCL's ends the process without
a word of who lags. It is for ranks whose threads do not run either."""

_timeout = timedelta(minutes=10) + SPARE
"""Of every group but the patient one."""


def start(timeout_s: float = 600.0) -> Launch:
    """Join the process group the launcher described, or a group of one without a launcher.

    Raises:
        UserError: the environment contradicts itself, or the ranks cannot meet.
    """
    global _patient, _timeout
    launch = this_launch()
    if dist.is_initialized():
        return launch
    if launch.launcher == "mpirun":
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
        # The watch counts in turns of its own, so that it may speak a tenth later.
        _timeout = timedelta(seconds=1.1 * timeout_s) + SPARE
        _join(launch)
        _patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    except dist.DistError as error:
        raise UserError(
            f"the ranks cannot meet at {launch.address}:{launch.port}: {error}. If another job on "
            "that machine has the port, give another: --master_port (deepspeed, torchrun), "
            "MASTER_PORT (srun, mpirun). If that is not rank 0's machine as the others know it, "
            "set MASTER_ADDR; where machines find themselves at 127.0.0.1, GLOO_SOCKET_IFNAME."
        ) from error
    _check_devices()
    return launch


def _check_devices() -> None:
    """A rank whose GPU is not there would wait on the CPU for ever, for others that do not come."""
    found = gather_objects((on_gpu(), socket.gethostname()))
    odd = [f"{rank} on {host}" for rank, (gpu, host) in enumerate(found) if not gpu]
    if 0 < len(odd) < len(found):
        raise UserError(
            f"some ranks have a GPU and others do not see one: rank {', '.join(odd)}. Look at its "
            "driver there (nvidia-smi), or set DS_ACCELERATOR=cpu for all.",
            shared=True,
        )


def _join(launch: Launch) -> None:
    store = None
    if launch.world_size == 1:
        # A group of one needs no port, so two runs on a machine cannot collide.
        store = dist.HashStore()  # type: ignore[attr-defined]
    elif launch.launcher == "torchrun":
        store = _store_of_this_attempt(launch, _timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu() else "gloo",
        timeout=_timeout,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def _store_of_this_attempt(launch: Launch, patience: timedelta) -> Any:
    """A part of torchrun's store that nobody wrote to before.

    When torchrun starts all ranks again, torch 2.13 gives them the store of the dead ones, with the
    addresses of those in it. Its count of restarts is each node's own. So rank 0 names a part of
    the store, and the others believe a name only once rank 0 has answered to their own: that of
    an earlier attempt is answered by nobody.
    """
    whole, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=patience))
    name = uuid4().hex
    if launch.rank == 0:
        part = dist.PrefixStore(name, whole)  # type: ignore[attr-defined]
        whole.set("attempt", name)
        for other in range(1, launch.world_size):
            part.set(part.get(f"rank {other}").decode(), "welcome")
        return part
    until = time.monotonic() + patience.total_seconds()
    while time.monotonic() < until:
        named = whole.get("attempt").decode()
        part = dist.PrefixStore(named, whole)  # type: ignore[attr-defined]
        part.set(f"rank {launch.rank}", name)
        if part.check([name]):
            return part
        time.sleep(0.05)
    raise dist.DistStoreError("rank 0 does not answer")


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


def _enter(collective: str) -> None:
    global last_collective
    last_collective = collective


def all_gather_flat(shard: Tensor, numel: int) -> Tensor:
    """Every rank's equal-length 1-D shard in rank order, without the tail padding: ``numel``
    elements.

    Each rank receives ``world_size * len(shard)`` elements.
    """
    _enter("all_gather_flat")
    out = shard.new_empty(shard.numel() * world_size())
    if world_size() == 1:
        out.copy_(shard)
    else:
        dist.all_gather(list(out.chunk(world_size())), shard.contiguous())
        traffic_bytes["all_gather"] += out.nbytes - shard.nbytes
    return out[:numel]


def sum_over_ranks(t: Tensor) -> Tensor:
    """The elementwise sum of every rank's ``t``, as a new tensor. A ring moves 2x the tensor."""
    _enter("sum_over_ranks")
    return _reduce(t, dist.ReduceOp.SUM)


def max_over_ranks(t: Tensor) -> Tensor:
    """The elementwise maximum of every rank's ``t``, as a new tensor."""
    _enter("max_over_ranks")
    return _reduce(t, dist.ReduceOp.MAX)


def _reduce(t: Tensor, op: Any) -> Tensor:
    out = t.clone()
    if world_size() > 1:
        dist.all_reduce(out, op=op)
        traffic_bytes["all_reduce"] += 2 * out.nbytes
    return out


def largest(value: int) -> int:
    """The largest of every rank's ``value``. Does not wait for what a GPU has yet to do."""
    _enter("largest")
    if world_size() == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_patient)
    return int(box)


def broadcast(t: Tensor) -> Tensor:
    """Rank 0's ``t`` on every rank, in place."""
    _enter("broadcast")
    if world_size() > 1:
        dist.broadcast(t, src=0)
        traffic_bytes["broadcast"] += t.nbytes if rank() else 0
    return t


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank, pickled between our own processes. For small things."""
    _enter("broadcast_object")
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def gather_objects(value: Any, *, after: str = "") -> list[Any]:
    """Every rank's value, in rank order, on every rank. For small things."""
    _enter(f"gather_objects after {after}" if after else "gather_objects")
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
    _enter("barrier")
    if world_size() > 1:
        dist.barrier(group=_patient)


# --- what watch.py asks for; not collectives ------------------------------------------------------


def num_collectives() -> int:
    """How many this rank has entered, DeepSpeed's among them: the same on ranks that keep step."""
    backends: set[Any] = {
        group._get_backend(device)
        for group in list(dist.distributed_c10d._world.pg_map)
        for device in group._device_types
    }
    return sum(backend._get_sequence_number_for_group() for backend in backends)


def bound_all_groups() -> None:
    """Have the groups that DeepSpeed made give up when ours does: they came with torch's default,
    10 minutes for NCCL and 30 for gloo."""
    for group in dist.distributed_c10d._world.pg_map:
        if group is not _patient:
            dist.distributed_c10d._set_pg_timeout(_timeout, group)


class Store:
    """What the ranks met at, through a connection of its own: the main thread may be waiting on
    the other."""

    def __init__(self, answers_within_s: float) -> None:
        shared: Any = dist.distributed_c10d._get_default_store()
        self._store = shared.clone()
        self._store.set_timeout(timedelta(seconds=answers_within_s))

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, keys: list[str]) -> list[str]:
        """All of them are there, or it is an error."""
        return [value.decode() for value in self._store.multi_get(keys)]


def store_is_in_rank_0() -> bool:
    """Does a stopped rank 0 stop the store? torchrun keeps it in a process of its own."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
