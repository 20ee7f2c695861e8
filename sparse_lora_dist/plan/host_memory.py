"""Find how much host memory the ranks of a machine may use: by the machine, by the limits of their
cgroup, and by what Slurm gives the job."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from sparse_lora_dist.distributed.launch_slurm import memory_of_node
from sparse_lora_dist.system.cgroups import memory_limit

SPARE = 1.1
"""Factor between the planned memory and the memory that is advised to ask for."""
STEP_MIB = 100
"""Advised sizes are multiples of this many MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Host memory that the ranks of one machine may use."""

    bytes: int
    """Its size, with what the ranks hold already."""
    owner: str
    """Whose memory it is, and what limits it, such as "this machine" or "this job
    (SLURM_MEM_PER_NODE)"."""


def host_memory(ranks_here: int, environ: Mapping[str, str]) -> HostMemory:
    """Return the smallest of the memory of this machine, the limit of this process's cgroup, and
    what Slurm gives the job on this node.

    Args:
        ranks_here: number of ranks on this machine.
        environ: the environment variables of the process.
    """
    return smallest(
        free=psutil.virtual_memory().available + ranks_here * _own(),
        cgroup=memory_limit(),
        slurm=memory_of_node(environ),
    )


def smallest(*, free: int, cgroup: int | None, slurm: tuple[int, str] | None) -> HostMemory:
    """Return the smallest of several limits on the memory of a machine's ranks.

    Args:
        free: bytes of the machine that no other process uses.
        cgroup: limit of the cgroup in bytes; None without a limit.
        slurm: (bytes that Slurm gives the job on this node, the variable that says so), or None.
    """
    found = [HostMemory(bytes=free, owner="this machine")]
    if cgroup is not None:
        found.append(HostMemory(bytes=cgroup, owner="this job (limit of its cgroup)"))
    if slurm is not None:
        found.append(HostMemory(bytes=slurm[0], owner=f"this job ({slurm[1]})"))
    return min(found, key=lambda one: one.bytes)


def _own() -> int:
    """Return the bytes of this process that no other process shares, which the machine does not
    count as available."""
    own = psutil.Process().memory_info()
    return int(own.rss - own.shared)


def mem_option(host_bytes: int) -> str:
    """Return the option of sbatch that asks for enough memory on each node, with a tenth to spare.

    Args:
        host_bytes: planned peak of host memory on one machine, over all its ranks.
    """
    steps = math.ceil(SPARE * host_bytes / (STEP_MIB * 2**20))
    return f"--mem={steps * STEP_MIB}M"
