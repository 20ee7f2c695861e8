"""Choose how many CPU threads a rank computes with, from what its job was given of the machine."""

from collections.abc import Collection, Mapping, Sequence

from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.distributed.launch_slurm import in_a_job, number


def threads_of_rank(
    launch: Launch, share: int, *, environ: Mapping[str, str], quota: float | None
) -> int | None:
    """Return the number of CPU threads for this rank; None if the user has set OMP_NUM_THREADS.

    With a thread for each core of the machine, ranks of a job that was given fewer cores would
    wait for each other: 15 times slower for one core of many.

    Args:
        launch: the launch of this process.
        share: this rank's share of the processors that the kernel lets it use, from ``own_cpus``.
        environ: the environment variables of the process.
        quota: processor time that the ranks of this machine may use together, in processors, from
            ``cgroups.cpu_limit``; None without a limit.
    """
    if "OMP_NUM_THREADS" in environ:
        return None
    shares = [share, cpus_of_rank(environ, launch)]
    shares += [] if quota is None else [int(quota / launch.local_size)]
    return max(1, min(n for n in shares if n is not None))


def cpus_of_rank(environ: Mapping[str, str], launch: Launch) -> int | None:
    """Return the number of processors that Slurm gives this rank; None if it does not say so.

    Args:
        environ: the environment variables of the process.
        launch: the launch of this process.
    """
    if not in_a_job(environ):
        return None
    own = number(environ, "SLURM_CPUS_PER_TASK") if launch.launcher == "srun" else None
    all_of_node = number(environ, "SLURM_CPUS_ON_NODE")
    return own or (max(1, all_of_node // launch.local_size) if all_of_node else None)


def own_cpus(own: Collection[int], masks: Sequence[Collection[int]]) -> int:
    """Return a rank's share of the processors that it may use.

    A processor that several ranks may use counts for each of them in part. So the launcher need not
    be asked whether it binds ranks to processors, and to how many.

    Args:
        own: processors that this rank may use (its affinity mask).
        masks: those of each rank of this machine, this rank's included.
    """
    share = sum(1 / sum(cpu in mask for mask in masks) for cpu in own)
    return max(1, int(share + 1e-6))
