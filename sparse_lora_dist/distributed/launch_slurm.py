"""What Slurm writes in a form of its own: lists of hosts, counts of tasks, and no port at all."""

import re

FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Below 32768, where Linux begins to give ports to whoever asks for any."""


def first_host(nodelist: str) -> str:
    """``gpu[007-009,012],login1`` -> ``gpu007``, the host of rank 0."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def tasks_on_node(counts: str, node: int) -> int:
    """``2(x3),1`` gives 2 tasks to each of the first three nodes, 1 to the fourth, 0 beyond."""
    each = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
        for _ in range(int(times or 1))
    ]
    return each[node] if node < len(each) else 0


def port_of_step(job: int, step: int) -> int:
    """The same on every task, with nothing exchanged. Jobs that share a node have numbers close to
    each other, and their steps begin at 0: a hundred steps of each find ports of their own."""
    return FIRST_PORT + (job * 101 + step) % NUM_PORTS
