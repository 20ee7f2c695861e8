"""Every torch.distributed call of the package: joining the process group, collectives, and what
``runtime/watchdog.py`` needs. The watchdog is a thread of each rank that ends a run without
progress, and names the rank that is stuck.

A function whose docstring says "Collective." must be called by all ranks, in the same order. On a
single rank collectives communicate nothing, so callers need no branch on the number of ranks.
"""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sparse_lora_dist.distributed.device import find_same_gpu
from sparse_lora_dist.distributed.launch import Launch, this_launch
from sparse_lora_dist.distributed.launch_mpi import with_meeting_place
from sparse_lora_dist.distributed.meeting_place import listening_socket, own_address_in_words
from sparse_lora_dist.distributed.shared_message import print_once
from sparse_lora_dist.distributed.threads import own_cpus, threads_of_rank
from sparse_lora_dist.errors import UserError, in_words
from sparse_lora_dist.system.cgroups import cpu_limit

traffic_bytes: Counter[str] = Counter()
"""Bytes of tensors that this rank received through this module, by kind of collective: all_gather,
all_reduce, reduce_scatter, broadcast. An all_reduce counts twice the bytes of its tensor, which is
what a ring all-reduce moves. DeepSpeed's own collectives and pickled objects are not counted."""

_patient: Any = None
"""Process group of all ranks (gloo, on CPUs) with a timeout of one day. It is for long waits, such
as those for one rank that downloads or tokenises. If another rank dies, its connection closes, and
the wait ends at once."""

last_collective = "none"
"""Name of the collective of this module that this rank entered last. DeepSpeed's own collectives
are not seen here; ``num_collectives`` counts them."""

OPEN_MPI = "OMPI_COMM_WORLD_LOCAL_RANK"
"""Variable in which Open MPI's mpirun says the rank of a process on its machine."""
GPU_DEFAULTS = {
    # Shards and gathered tensors of many sizes alternate, which otherwise leaves gaps.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # torch would end a job that Slurm suspends for longer than its 8 minutes.
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "86400",
}
"""Environment variables of torch on a GPU, set where the user has not."""

SPARE = timedelta(seconds=60)
"""Time by which the process groups' timeout exceeds the watchdog's, so that the watchdog acts
first. NCCL's timeout ends the process without naming the rank that is stuck. It is the fallback
for ranks whose watchdog thread does not run."""

FAILED, LOOK_S = "a rank cannot connect", 0.5
"""Key in the store under which a rank says that it cannot connect, and seconds between two looks
of the other ranks."""

_timeout = timedelta(minutes=10) + SPARE
"""Timeout of every process group except ``_patient``. ``start`` sets it."""


def start(timeout_s: float = 600.0) -> Launch:
    """Join the process group that the launcher described, or a group of one rank. Collective.
    A group that the calling program has made is used, if it has the launcher's ranks.

    Call it once at the start of a program, before any other function of this module that is
    collective. It also chooses this rank's GPU and its number of CPU threads, and sets the
    environment variables that DeepSpeed reads. Further calls only return the launch.

    Args:
        timeout_s: seconds after which the watchdog ends a run that makes no progress
            (``--collective_timeout``). The process groups time out a little later (``SPARE``).

    Returns:
        Launcher, rank, world size and rendezvous address of this process. Under mpirun only the
        first call returns an address.

    Raises:
        UserError: the environment variables contradict each other or the program's own process
            group, the ranks cannot connect, or only some of them have a GPU.
    """
    global _timeout
    launch = this_launch()
    if dist.is_initialized():
        if _patient in dist.distributed_c10d._world.pg_map:  # this function has been here
            if launch.launcher == "python":  # ``variables_of_one_rank`` has taken them away
                _set_variables(launch)
            return launch
        launch.check_group(rank(), world_size(), dist.get_backend_config(), gpu=on_gpu())
    if launch.launcher == "mpirun":
        launch = with_meeting_place(launch)
    launch.check_address()
    if on_gpu():
        for name, value in GPU_DEFAULTS.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(_device_of(launch))
    _set_variables(launch)
    # The watchdog checks at intervals, so it may report up to a tenth later than timeout_s.
    _timeout = timedelta(seconds=1.1 * timeout_s) + SPARE
    _join(launch)
    _check_devices()
    _set_threads(launch)
    return launch


def _device_of(launch: Launch) -> int:
    # With srun --gpus-per-task=1 each rank sees one GPU, number 0.
    return launch.local_rank % torch.cuda.device_count() if on_gpu() else launch.local_rank


def _set_variables(launch: Launch) -> None:
    os.environ.update(launch.variables())  # DeepSpeed reads them
    set_local_rank(_device_of(launch))


@contextmanager
def variables_of_one_rank() -> Iterator[None]:
    """Context manager: at its end, the variables that ``start`` has set in a program without a
    launcher are gone. Programs that it starts would take themselves for ranks. Not collective."""
    before = {*os.environ}
    alone = this_launch().launcher == "python"
    try:
        yield
    finally:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if alone else ():
            if name not in before:
                os.environ.pop(name, None)


def set_local_rank(device: int) -> None:
    """Set LOCAL_RANK, and Open MPI's variable for it, to the number of this rank's GPU among those
    that it sees. DeepSpeed asserts that both are the same. Not collective."""
    os.environ["LOCAL_RANK"] = str(device)
    if OPEN_MPI in os.environ:
        os.environ[OPEN_MPI] = str(device)


def _set_threads(launch: Launch) -> None:
    """Give this rank its share of the CPU threads, unless OMP_NUM_THREADS is set. Collective."""
    host, own = socket.gethostname(), sorted(os.sched_getaffinity(0))
    masks = [mask for name, mask in gather_objects((host, own)) if name == host]
    share = own_cpus(own, masks)
    threads = threads_of_rank(launch, share, environ=os.environ, quota=cpu_limit())
    if threads is not None:
        torch.set_num_threads(threads)


def _check_devices() -> None:
    """Raise UserError if only some ranks have a GPU, or two ranks the same one. Collective.

    Otherwise ranks with a GPU would communicate over NCCL and the others over gloo, and each would
    wait for the other in the first collective. NCCL takes one rank a GPU.
    """
    own = torch.cuda.get_device_properties(torch.cuda.current_device()) if on_gpu() else None
    same = find_same_gpu(gather_objects(None if own is None else str(own.uuid)))
    if same is not None:
        raise UserError(
            f"Ranks {same[0]} and {same[1]} are on the same GPU. Start at most as many ranks on a "
            "machine as it has GPUs (nvidia-smi -L), and let each rank see all of them or its own.",
            shared=True,
        )
    found = gather_objects((on_gpu(), socket.gethostname()))
    without = [f"{rank} on {host}" for rank, (gpu, host) in enumerate(found) if not gpu]
    if 0 < len(without) < len(found):
        raise UserError(
            f"Some ranks have a GPU, but these do not see one: rank {', rank '.join(without)}. "
            "Check the GPU driver there (nvidia-smi), or give --device cpu.",
            shared=True,
        )


def _join(launch: Launch) -> None:
    """Create the default process group, with gloo for CPU tensors and NCCL for GPU tensors, and the
    group for long waits. If the program has a default group, only the other is made. Collective."""
    global _patient
    if dist.is_initialized():
        _patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        return
    try:
        store = _store(launch)
    except (dist.DistError, OSError) as error:
        raise UserError(
            f"The ranks cannot connect at {launch.address}:{launch.port}: {error}. If another job "
            "on that machine uses the port, choose another with --master_port (deepspeed, "
            "torchrun) or MASTER_PORT (srun, mpirun). If the other machines do not reach rank 0's "
            "machine by that address, set MASTER_ADDR.",
            shared=True,
        ) from error
    with _ending_together(store, launch):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu() else "gloo",
            timeout=_timeout,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
        )
        _patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))


def _store(launch: Launch) -> Any:
    """Return the key-value store through which the ranks find each other. Collective."""
    if launch.world_size == 1:
        # A group of one rank needs no port, so two runs on a machine cannot collide.
        return dist.HashStore()  # type: ignore[attr-defined]
    if not store_is_in_rank_0():
        return _store_of_this_start(launch, _timeout)
    listener = listening_socket(launch) if launch.rank == 0 else None
    return dist.TCPStore(  # type: ignore[attr-defined]
        host_name=str(launch.address),
        port=int(launch.port or 0),
        world_size=launch.world_size,
        is_master=launch.rank == 0,
        timeout=_timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )


@contextmanager
def _ending_together(store: Any, launch: Launch) -> Iterator[None]:
    """Context manager in which the ranks connect to each other. If one of them cannot, it raises a
    UserError, and the other ranks end with its message instead of waiting for it. Collective."""
    if launch.world_size == 1:
        try:
            yield
        except RuntimeError as error:  # as below
            raise UserError(_cannot_connect(launch, error), shared=True) from error
        return
    ended = threading.Event()
    watch = threading.Thread(
        target=_end_if_another_fails, args=(store.clone(), launch, ended), daemon=True
    )
    watch.start()
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing more exact
        message = _cannot_connect(launch, error)
        with suppress(RuntimeError):
            store.set(FAILED, message)
        if launch.rank == 0:
            time.sleep(4 * LOOK_S)  # the store, which the other ranks read, ends with this process
        raise UserError(message, shared=True) from error
    finally:
        ended.set()
        watch.join()


def _end_if_another_fails(store: Any, launch: Launch, ended: threading.Event) -> None:
    """End this process if another rank cannot connect. In a thread: the main one waits in gloo."""
    while not ended.wait(LOOK_S):
        try:
            message = store.get(FAILED).decode() if store.check([FAILED]) else None
        except RuntimeError:
            message = "rank 0 ended while the ranks were connecting. See its message."
        if message is not None and not ended.wait(LOOK_S):  # this rank may have failed as well
            print_once(f"error: {message}", launch)
            os._exit(2)


def _cannot_connect(launch: Launch, error: RuntimeError) -> str:
    return (
        f"rank {launch.rank} on {socket.gethostname()} cannot connect to the other ranks: "
        f"{in_words(error)}. {own_address_in_words()}Ranks reach each other at the address that "
        "each machine has for its own name. If that is 127.0.0.1 or in a network that the others "
        "do not reach, set GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME too, to the name "
        "of the network interface to use (ip address lists them)."
    )


def _store_of_this_start(launch: Launch, timeout: timedelta) -> Any:
    """Return a view of torchrun's key-value store for the ranks of this start alone. Collective.

    The view puts a prefix before each key. When torchrun restarts all ranks, torch 2.13 gives them
    the old store, which still holds the addresses of the dead ranks. torchrun's restart count does
    not help: each node has its own. So the ranks agree on a new prefix. They do it in a handshake
    that the keys of an earlier start cannot fake. For rank 3, it sets these keys:

        rank 0          start -> PREFIX                   (a random text)
        rank 3          PREFIX/rank 3 -> TOKEN            (random, under the prefix that it read)
        rank 0          PREFIX/TOKEN -> welcome           (rank 3 now knows that PREFIX is not old)
    """
    store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    if launch.rank == 0:
        prefix = uuid4().hex
        section = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        store.set("start", prefix)
        for other in range(1, launch.world_size):
            section.set(section.get(f"rank {other}").decode(), "welcome")
        return section
    token = uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        prefix = store.get("start").decode()
        section = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        section.set(f"rank {launch.rank}", token)
        if section.check([token]):
            return section
        time.sleep(0.05)
    raise dist.DistStoreError("rank 0 has not answered in time")


def ranks_on_this_machine() -> int:
    """Return the number of ranks on this machine. Not collective."""
    return this_launch().local_size


def num_nodes() -> int:
    """Return the number of machines that the ranks run on. Collective."""
    return sum(gather_objects(is_first_on_its_node()))


def on_gpu() -> bool:
    """Return True if this rank computes on a GPU. Not collective.

    That is so if CUDA is available and DeepSpeed's environment variable DS_ACCELERATOR is not
    "cpu".
    """
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"


def rank() -> int:
    """Return this process's rank, 0 without a process group. Not collective."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group. Not collective."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Return the device that this rank computes on: its GPU or the CPU. Not collective."""
    if on_gpu():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _enter(collective: str) -> None:
    global last_collective
    last_collective = collective


def all_gather_flat(shard: Tensor, numel: int) -> Tensor:
    """Concatenate the shards of all ranks. Collective.

    Args:
        shard: this rank's 1-D tensor, of the same length and dtype on every rank.
        numel: number of elements to keep; those after them are the padding of the last shards.

    Returns:
        A new 1-D tensor: the shards in rank order, cut to ``numel`` elements. Each rank receives
        ``world_size * len(shard)`` elements.
    """
    _enter("all_gather_flat")
    out = shard.new_empty(shard.numel() * world_size())
    if world_size() == 1:
        out.copy_(shard)
    else:
        dist.all_gather_into_tensor(out, shard.contiguous())
        traffic_bytes["all_gather"] += out.nbytes - shard.nbytes
    return out[:numel]


def sum_over_ranks(t: Tensor) -> Tensor:
    """Return the elementwise sum of the ranks' tensors as a new tensor. Collective.

    The order of a floating-point sum depends on the number of ranks; sums of integers are exact.

    Args:
        t: this rank's tensor, of the same shape and dtype on every rank.
    """
    _enter("sum_over_ranks")
    return _reduce(t, dist.ReduceOp.SUM)


def sum_to_shards(t: Tensor, share: int) -> Tensor:
    """Return this rank's share of the sum of the ranks' tensors. Collective.

    Each rank receives one share from every rank, where ``sum_over_ranks`` would give it all.

    Args:
        t: this rank's tensor, of the same shape and dtype on every rank.
        share: number of elements of a share, so that ``world_size`` shares hold all of ``t``.

    Returns:
        A new 1-D tensor: elements ``rank * share`` to ``(rank + 1) * share`` of the flattened sum,
        fewer or none at its end.
    """
    _enter("sum_to_shards")
    flat = t.flatten()
    if world_size() == 1:
        return flat.clone()
    padded = torch.nn.functional.pad(flat, (0, share * world_size() - flat.numel()))
    own = flat.new_empty(share)
    dist.reduce_scatter_tensor(own, padded)
    traffic_bytes["reduce_scatter"] += padded.nbytes - own.nbytes
    start = min(share * rank(), flat.numel())
    return own[: min(share, flat.numel() - start)]


def max_over_ranks(t: Tensor) -> Tensor:
    """Return the elementwise maximum of the ranks' tensors as a new tensor. Collective.

    Args:
        t: this rank's tensor, of the same shape and dtype on every rank.
    """
    _enter("max_over_ranks")
    return _reduce(t, dist.ReduceOp.MAX)


def _reduce(t: Tensor, op: Any) -> Tensor:
    out = t.clone()
    if world_size() > 1:
        dist.all_reduce(out, op=op)
        traffic_bytes["all_reduce"] += 2 * out.nbytes
    return out


def largest(value: int) -> int:
    """Return the maximum of the ranks' integers on every rank. Collective.

    The values are exchanged between CPUs, so the call does not wait for work queued on a GPU.

    Args:
        value: this rank's integer.
    """
    _enter("largest")
    if world_size() == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_patient)
    return int(box)


def broadcast(t: Tensor) -> Tensor:
    """Overwrite ``t`` in place with rank 0's values, and return it. Collective.

    Args:
        t: this rank's tensor, of the same shape and dtype on every rank.
    """
    _enter("broadcast")
    if world_size() > 1:
        dist.broadcast(t, src=0)
        traffic_bytes["broadcast"] += t.nbytes if rank() else 0
    return t


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank. Collective.

    Args:
        value: object to send from rank 0. It is pickled, so it should be small. The other ranks'
            values are ignored.
    """
    _enter("broadcast_object")
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def gather_objects(value: Any, *, after: str = "") -> list[Any]:
    """Return a list of all ranks' values in rank order, on every rank. Collective.

    Args:
        value: this rank's value. It is pickled to be sent, so it should be small.
        after: what the ranks did before this call, such as "reading the data". The watchdog shows
            it if a rank does not arrive.
    """
    _enter(f"gather_objects after {after}" if after else "gather_objects")
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=_patient)
    return box


def is_first_on_its_node() -> bool:
    """Return True if this is the rank of its node with local rank 0. Not collective."""
    return this_launch().local_rank == 0


def barrier() -> None:
    """Wait until all ranks have called it, for up to one day. Collective."""
    _enter("barrier")
    if world_size() > 1:
        dist.barrier(group=_patient)


# --- used by the watchdog, not collective ---------------------------------------------------------


def num_collectives() -> int:
    """Return how many collectives this rank has entered, including DeepSpeed's. Not collective.

    Ranks with equal counts have reached the same collective.
    """
    backends: set[Any] = {
        group._get_backend(device)
        for group in list(dist.distributed_c10d._world.pg_map)
        for device in group._device_types
    }
    return sum(backend._get_sequence_number_for_group() for backend in backends)


def bound_all_groups() -> None:
    """Give all process groups except ``_patient`` the timeout of the default group. Not collective.

    Call it after DeepSpeed has created its groups. DeepSpeed creates them with torch's default
    timeouts: 10 minutes for NCCL and 30 for gloo.
    """
    for group in dist.distributed_c10d._world.pg_map:
        if group is not _patient:
            dist.distributed_c10d._set_pg_timeout(_timeout, group)


class Store:
    """Client of the process group's key-value store, with a connection of its own. Not collective.

    It does not share the process group's connection, on which the main thread may be blocked.

    Args:
        answers_within_s: timeout of each request, in seconds.
    """

    def __init__(self, answers_within_s: float) -> None:
        main: Any = dist.distributed_c10d._get_default_store()
        self._store = main.clone()
        self._store.set_timeout(timedelta(seconds=answers_within_s))

    def set(self, key: str, value: str) -> None:
        """Store ``value`` under ``key``, where all ranks can read it."""
        self._store.set(key, value)

    def get(self, keys: list[str]) -> list[str]:
        """Return the values stored under ``keys``, in the same order. Waits for missing keys.

        Raises:
            dist.DistError: a key is still missing at the timeout, or the store does not answer.
        """
        return [value.decode() for value in self._store.multi_get(keys)]


def store_is_in_rank_0() -> bool:
    """Return True if rank 0's process serves the key-value store. Not collective.

    Then the store is lost when rank 0 ends. Under torchrun, its agent process may serve the store
    instead.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
