"""Which rank of how many this process is, from what its launcher put into the environment.

torchrun, deepspeed    start the ranks' processes, so what they say rules over what started them
mpirun, srun           start the ranks themselves where they start several tasks
environment            RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set by hand
python                 none of them: a run of one rank
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from sparse_lora_dist.distributed.launch_slurm import first_host, port_of_step, tasks_on_node
from sparse_lora_dist.errors import UserError

ADVICE = (
    "Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together, or none of them and "
    "start with a launcher (README.md, Launching)."
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of one process among the ranks of a run."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on its own machine."""
    local_size: int = 1
    """How many ranks that machine has."""
    address: str | None = None
    """Where the ranks meet, on rank 0's machine; None where mpirun is still to be asked
    (``launch_mpi.py``), and for one rank."""
    port: int | None = None

    def variables(self, device: int) -> dict[str, str]:
        """What other libraries read; LOCAL_RANK is the number of a GPU to them."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": device}
        place = {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        all_of_it = numbers if self.world_size == 1 else numbers | place
        return {name: str(value) for name, value in all_of_it.items()}

    def in_words(self, nodes: int) -> str:
        """For the screen of a run of several ranks."""
        counted = "1 node" if nodes == 1 else f"{nodes} nodes"
        place = f"{self.address}:{self.port}"
        return f"{self.launcher}: {self.world_size} ranks on {counted}, meeting at {place}"


class Names(NamedTuple):
    """What a launcher calls things. ``sign`` is a variable that it alone sets."""

    launcher: str
    sign: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str


RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
AGENTS = (
    Names("torchrun", "TORCHELASTIC_RUN_ID", *RANKED, "LOCAL_WORLD_SIZE"),
    Names("deepspeed", "CROSS_SIZE", *RANKED, "LOCAL_SIZE"),
)
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SRUN = Names(
    "srun",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_TASKS_PER_NODE",
)
# mpirun before srun: inside a Slurm job it starts its daemons with srun, one a node, and the ranks
# inherit the daemon's task. Its PMI_SIZE alone comes last, since srun --mpi=pmi2 sets that too.
LAUNCHERS = (
    Names(
        "mpirun",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Names("mpirun", "MPI_LOCALRANKID", *HYDRA),
    SRUN,
    Names("mpirun", "PMI_SIZE", *HYDRA),
)


@cache
def this_launch() -> Launch:
    """That of this process. Found once: ``comm.start`` writes what it found over the environment.

    Raises:
        UserError: the environment contradicts itself.
    """
    return find_launch(os.environ)


def find_launch(environ: Mapping[str, str]) -> Launch:
    """What ``environ`` says.

    Raises:
        UserError: it contradicts itself, or a part is missing.
    """
    for names in AGENTS:
        if names.sign in environ:
            return _read(LauncherVariables(names, environ))
    for names in LAUNCHERS:
        variables = LauncherVariables(names, environ)
        # One task is no launch: an interactive step, or a program that starts ranks by hand. In a
        # shell of a step of several (srun --pty) the others do not come.
        in_a_shell = names.launcher == "srun" and "SLURM_PTY_PORT" in environ
        if names.sign in environ and variables.number(names.world_size) > 1 and not in_a_shell:
            _check_by_hand(variables)
            return _read(variables)
    sign = next((name for name in ("RANK", "WORLD_SIZE") if name in environ), None)
    if sign is None:
        return Launch(launcher="python")
    return _read(
        LauncherVariables(Names("environment", sign, *RANKED, "LOCAL_WORLD_SIZE"), environ)
    )


@dataclass(frozen=True)
class LauncherVariables:
    """The environment, and what the launcher calls things in it."""

    names: Names
    environ: Mapping[str, str]

    def text(self, name: str) -> str:
        """The value of a variable that must be there."""
        if name not in self.environ:
            sign = self.names.sign
            raise UserError(f"{sign}={self.environ[sign]} is set, but {name} is not. {ADVICE}")
        return self.environ[name]

    def number(self, name: str) -> int:
        """The whole number in a variable that must be there."""
        if not self.text(name).isdecimal():
            raise UserError(f"{name}={self.text(name)!r} is no whole number from 0. {ADVICE}")
        return int(self.text(name))


def _read(variables: LauncherVariables) -> Launch:
    names = variables.names
    rank, world_size = variables.number(names.rank), variables.number(names.world_size)
    local_size_name, local_size = _local_size(variables, world_size)
    local_rank = 0
    if local_size > 1 or names.local_rank in variables.environ:
        local_rank = variables.number(names.local_rank)
    _check_below(names.rank, rank, names.world_size, world_size)
    _check_below(names.local_rank, local_rank, local_size_name, local_size)
    if local_size > world_size:
        raise UserError(
            f"{local_size_name}={local_size} contradicts {names.world_size}={world_size}. {ADVICE}"
        )
    here = Launch(
        launcher=names.launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
    )
    return here if world_size == 1 else _with_meeting_place(here, variables)


def _check_below(name: str, number: int, limit_name: str, limit: int) -> None:
    if number >= limit:
        raise UserError(f"{name}={number} contradicts {limit_name}={limit}. {ADVICE}")


def _local_size(variables: LauncherVariables, world_size: int) -> tuple[str, int]:
    """Which variable says how many ranks this machine has, and how many."""
    name = variables.names.local_size
    if variables.names is SRUN:
        return name, tasks_on_node(variables.text(name), variables.number("SLURM_NODEID"))
    if variables.names.launcher == "environment" and name not in variables.environ:
        return variables.names.world_size, world_size
    return name, variables.number(name)


def _with_meeting_place(launch: Launch, variables: LauncherVariables) -> Launch:
    """What is set wins: a cluster's names of nodes may not be those of its fast network."""
    address = variables.environ.get("MASTER_ADDR")
    port = variables.number("MASTER_PORT") if "MASTER_PORT" in variables.environ else None
    if variables.names is SRUN:
        # The name need not resolve where no other node has to find this one.
        alone = launch.local_size == launch.world_size
        host = "127.0.0.1" if alone else first_host(variables.text("SLURM_STEP_NODELIST"))
        job, step = variables.number("SLURM_JOB_ID"), variables.number("SLURM_STEP_ID")
        address, port = address or host, port or port_of_step(job, step)
    elif launch.launcher != "mpirun":
        address, port = variables.text("MASTER_ADDR"), variables.number("MASTER_PORT")
    return replace(launch, address=address, port=port)


def _check_by_hand(variables: LauncherVariables) -> None:
    """LOCAL_RANK is not looked at: where each task sees one GPU, scripts set it to 0."""
    for ours, theirs in (
        ("RANK", variables.names.rank),
        ("WORLD_SIZE", variables.names.world_size),
    ):
        if ours in variables.environ and variables.number(ours) != variables.number(theirs):
            raise UserError(
                f"{ours}={variables.text(ours)} contradicts {theirs}={variables.text(theirs)}: "
                f"{variables.names.launcher} numbers the ranks. Unset RANK and WORLD_SIZE, or let "
                f"{variables.names.launcher} start one task."
            )
