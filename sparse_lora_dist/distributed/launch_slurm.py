"""Parse Slurm's formats (host lists, task counts, memory), and choose a port, since Slurm sets
none."""

import re
from collections.abc import Mapping

from sparse_lora_dist.errors import UserError

FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""First of the ports to choose from, and their number: 10000 to 29999. They are below 32768, where
Linux's range of ephemeral ports begins."""


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list, which runs rank 0.

    For example ``gpu[007-009,012],login1`` gives ``gpu007``.

    Args:
        nodelist: value of SLURM_STEP_NODELIST, in Slurm's compressed form.
    """
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def tasks_on_node(counts: str, node: int) -> int:
    """Return the number of tasks on a node, from Slurm's compressed counts.

    For example ``2(x3),1`` means 2 tasks on each of the first three nodes, 1 on the fourth and 0 on
    any other.

    Args:
        counts: the value of SLURM_STEP_TASKS_PER_NODE.
        node: index of the node in the step, from 0 (SLURM_NODEID).
    """
    each = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
        for _ in range(int(times or 1))
    ]
    return each[node] if node < len(each) else 0


def port_of_step(job: int, step: int) -> int:
    """Return a rendezvous port that depends only on the job and the step.

    So every task of the step computes the same port without communication. Jobs that share a node
    tend to have close IDs, and each counts its steps from 0. The factor 101 gives each of the first
    hundred steps of such jobs a port of its own.

    Args:
        job: SLURM_JOB_ID.
        step: SLURM_STEP_ID.
    """
    return FIRST_PORT + (job * 101 + step) % NUM_PORTS


def restart_count(environ: Mapping[str, str]) -> int:
    """Return how often Slurm has requeued this job; 0 outside of Slurm.

    Args:
        environ: the environment variables of the process.

    Raises:
        UserError: SLURM_RESTART_COUNT is not a whole number.
    """
    text = environ.get("SLURM_RESTART_COUNT", "0")
    if not text.isdecimal() or len(text) > 9:
        raise UserError(
            f"SLURM_RESTART_COUNT={text[:40]!r} must be a whole number from 0, as Slurm sets it. "
            "Unset it."
        )
    return int(text)


def tasks_without_srun(environ: Mapping[str, str], program: str) -> str | None:
    """Return a warning if Slurm gave this job several tasks, but one rank was started without srun.

    Then one rank trains, with the rows of one rank in each step, while the other tasks' processors
    idle. Returns None if the job has one task, or there is no Slurm.

    Args:
        environ: the environment variables of a process that no launcher started.
        program: path of the program, as it was typed.
    """
    for name, thing in (("SLURM_NTASKS", "tasks"), ("SLURM_JOB_NUM_NODES", "nodes")):
        count = number(environ, name)
        if in_a_job(environ) and count is not None and count > 1:
            return (
                f"this job has {count} {thing} ({name}={count}), but the program was started "
                f"without srun, so 1 rank trains. Start it with: srun python {program} ... "
                "For one rank, submit with --nodes=1 --ntasks=1."
            )
    return None


def in_a_job(environ: Mapping[str, str]) -> bool:
    """Return True if this process belongs to a job of Slurm."""
    return "SLURM_JOB_ID" in environ


def number(environ: Mapping[str, str], name: str) -> int | None:
    """Return the value of a variable of Slurm as a whole number above 0; None for any other value.

    Args:
        environ: the environment variables of the process.
        name: name of the variable.
    """
    text = environ.get(name, "")
    found = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0
    return found or None


def memory_of_node(environ: Mapping[str, str]) -> tuple[int, str] | None:
    """Return the memory that Slurm gives this job on this node, and the variable that says so.

    Args:
        environ: the environment variables of the process.

    Returns:
        (bytes, name of the variable); None outside of a job, and for a job that may use all memory
        of its nodes.
    """
    counts = {
        "SLURM_MEM_PER_NODE": 1,
        "SLURM_MEM_PER_CPU": number(environ, "SLURM_CPUS_ON_NODE"),
        "SLURM_MEM_PER_GPU": number(environ, "SLURM_GPUS_ON_NODE"),
    }
    for name, count in counts.items():
        megabytes = number(environ, name)
        if in_a_job(environ) and megabytes is not None and count is not None:
            return megabytes * count * 2**20, name
    return None
