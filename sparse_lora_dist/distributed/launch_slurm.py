"""Parse Slurm's own formats (host lists, task counts) and choose a port, which Slurm does not."""

import re

FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Ports 10000 to 29999, below 32768, where Linux's range of ephemeral ports begins."""


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list, which has rank 0:
    ``gpu[007-009,012],login1`` gives ``gpu007``."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def tasks_on_node(counts: str, node: int) -> int:
    """Return how many tasks a node has, from Slurm's compressed counts.

    ``2(x3),1`` gives 2 tasks to each of the first three nodes, 1 to the fourth, 0 to any other.

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
    """Return the port of a Slurm job step, computed alike on every task without communication.

    Jobs that share a node have close numbers and count their steps from 0. With a stride of 101
    the first hundred steps of each job get ports of their own.
    """
    return FIRST_PORT + (job * 101 + step) % NUM_PORTS
