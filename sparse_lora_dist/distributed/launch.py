"""Read rank and world size of this process from the environment variables that its launcher set.

If the variables of several launchers are set, the first in this list counts:

    torchrun, deepspeed    these start the ranks' processes, even inside srun or mpirun
    mpirun, srun           these count only if they started several tasks
    environment            RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set by hand
    python                 none of the above: a run of one rank
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from sparse_lora_dist.distributed.launch_slurm import (
    first_host,
    port_of_step,
    restart_count,
    tasks_on_node,
)
from sparse_lora_dist.errors import UserError

ADVICE = (
    "Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together, or unset all of them "
    "and start with a launcher (see docs/launchers.md)."
)

LAST_PORT, MOST_DIGITS = 65535, 18
"""Largest port, and largest number of digits of any variable."""
MOST_RANKS = 1_000_000
"""Largest number of ranks of a run. No machine has so many, and torch counts them in 32 bits."""
RESOLVE_S = 3.0
"""Longest time in seconds to ask again for a host name while no name server answers."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Rank, world size and rendezvous address of one process."""

    launcher: str
    """torchrun, deepspeed, mpirun, srun, environment or python (see the module docstring)."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Index of this rank among the ranks on its machine, from 0."""
    local_size: int = 1
    """Number of ranks on this machine."""
    address: str | None = None
    """Name or IP address of rank 0's machine, where the ranks meet. None for a single rank, and
    under mpirun until ``launch_mpi.py`` finds it."""
    port: int | None = None
    """Port on rank 0's machine where the ranks meet. None where ``address`` is None."""

    def variables(self) -> dict[str, str]:
        """Return the environment variables that other libraries, such as DeepSpeed, read.

        Returns:
            Dict from name to value: RANK and WORLD_SIZE, and with several ranks MASTER_ADDR and
            MASTER_PORT too. ``comm.set_local_rank`` sets LOCAL_RANK.
        """
        ranks = {"RANK": self.rank, "WORLD_SIZE": self.world_size}
        meeting_place = {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        variables = ranks if self.world_size == 1 else ranks | meeting_place
        return {name: str(value) for name, value in variables.items()}

    def in_words(self, nodes: int) -> str:
        """Return a line that describes the launch of several ranks, for the terminal.

        Args:
            nodes: number of nodes that the ranks run on.
        """
        counted = "1 node" if nodes == 1 else f"{nodes} nodes"
        place = f"{self.address}:{self.port}"
        return f"{self.launcher}: {self.world_size} ranks on {counted}, meeting at {place}"

    def check_address(self) -> None:
        """Raise UserError if the host name of rank 0's machine is not known here. Not a collective.

        To be called before anything is loaded. torch would ask for the name again and again, for
        minutes.
        """
        deadline = time.monotonic() + RESOLVE_S
        while self.world_size > 1 and self.address is not None:
            try:
                socket.getaddrinfo(self.address, self.port)
                return
            except (OSError, UnicodeError) as error:
                no_server = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
                if not no_server or time.monotonic() > deadline:
                    raise UserError(
                        f"MASTER_ADDR={self.address} is not known on {socket.gethostname()} "
                        f"({error}). Set MASTER_ADDR to a name or IP address of rank 0's machine "
                        "that all machines can reach.",
                        shared=True,
                    ) from error
                time.sleep(0.5)

    def check_group(self, rank: int, world_size: int, backends: str, *, gpu: bool) -> None:
        """Raise UserError if a process group that the calling program has made cannot be used. Not
        a collective.

        Args:
            rank: this process's rank in the group.
            world_size: number of ranks of the group.
            backends: backends of the group by device, such as "cpu:gloo,cuda:nccl".
            gpu: whether this rank computes on a GPU.
        """
        if (rank, world_size) != (self.rank, self.world_size):
            raise UserError(
                f"The program has called init_process_group as rank {rank} of {world_size}, but by "
                f"the environment it is rank {self.rank} of {self.world_size}. Start it with "
                "torchrun or deepspeed (see docs/launchers.md), or set RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each process before it uses "
                "sparse_lora_dist."
            )
        for kind in ("cpu", "cuda") if gpu else ("cpu",):
            if f"{kind}:" not in backends:
                raise UserError(
                    f"The program has called init_process_group with {backends}, which lacks a "
                    f"backend for tensors on {kind}. Leave its argument backend out.",
                    shared=True,
                )


class Names(NamedTuple):
    """Names of the environment variables in which one launcher sets rank, world size and so on.

    ``rank``, ``world_size``, ``local_rank`` and ``local_size`` are names of variables. Their values
    have the meanings of the attributes of ``Launch``.
    """

    launcher: str
    """Name of the launcher, as in ``Launch.launcher``."""
    marker: str
    """Name of a variable that the launcher always sets, and by which it is recognised."""
    rank: str
    world_size: str
    local_rank: str
    local_size: str


RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Names of the variables that torchrun, deepspeed and users set."""
AGENTS = (
    Names("torchrun", "TORCHELASTIC_RUN_ID", *RANKED, "LOCAL_WORLD_SIZE"),
    Names("deepspeed", "CROSS_SIZE", *RANKED, "LOCAL_SIZE"),
)
"""Variables of the launchers that start the ranks' processes themselves. They count even if there
is only one rank, and even inside srun or mpirun."""
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""Names of the variables that Hydra sets, which is the mpirun of MPICH and Intel MPI."""
SRUN = Names(
    "srun",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_TASKS_PER_NODE",
)
# mpirun comes before srun: inside a Slurm job it starts a daemon on each node with srun, and the
# ranks inherit the daemon's srun variables. An mpirun that sets only PMI_SIZE comes last, since
# srun --mpi=pmi2 sets PMI_SIZE too.
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
"""Variables of the launchers that count only if they started several tasks. If several launchers
did, the first in this tuple counts."""


@cache
def this_launch() -> Launch:
    """Return rank, world size and rendezvous address of this process. Not collective.

    The result is cached, since ``comm.start`` overwrites the environment variables.

    Raises:
        UserError: the variables contradict each other, or one is missing.
    """
    return find_launch(os.environ)


def find_launch(environ: Mapping[str, str]) -> Launch:
    """Return rank, world size and rendezvous address of a process.

    Args:
        environ: the environment variables of the process.

    Raises:
        UserError: the variables contradict each other, one is missing, or has a wrong value.
    """
    restart_count(environ)  # read later, by the run lock and by --resume
    for names in AGENTS:
        if names.marker in environ:
            return _read(LauncherVariables(names, environ))
    for names in LAUNCHERS:
        variables = LauncherVariables(names, environ)
        # A single task is no launch of ranks but an interactive step, or a program that starts
        # ranks itself. Nor is a shell (srun --pty) in a step of several tasks: only one has it.
        in_a_shell = names.launcher == "srun" and "SLURM_PTY_PORT" in environ
        if names.marker in environ and variables.number(names.world_size) > 1 and not in_a_shell:
            _check_variables_set_by_hand(variables)
            return _read(variables)
    marker = next((name for name in ("RANK", "WORLD_SIZE") if name in environ), None)
    if marker is None:
        return Launch(launcher="python")
    return _read(
        LauncherVariables(Names("environment", marker, *RANKED, "LOCAL_WORLD_SIZE"), environ)
    )


@dataclass(frozen=True)
class LauncherVariables:
    """Reads the variables of one launcher from the environment."""

    names: Names
    """Names of the launcher's variables."""
    environ: Mapping[str, str]
    """All environment variables."""

    def text(self, name: str) -> str:
        """Return the value of variable ``name``.

        Raises:
            UserError: the variable is not set.
        """
        if name not in self.environ:
            marker = self.names.marker
            raise UserError(f"{marker}={self.environ[marker]} is set, but {name} is not. {ADVICE}")
        return self.environ[name]

    def number(self, name: str) -> int:
        """Return the value of variable ``name`` as an integer.

        Raises:
            UserError: the variable is not set, or is not a whole number from 0.
        """
        text = self.text(name)
        if not text.isdecimal() or len(text) > MOST_DIGITS:
            raise UserError(f"{name}={text[:40]!r} must be a whole number from 0. {ADVICE}")
        return int(text)

    def port(self) -> int | None:
        """Return MASTER_PORT, or None if it is not set.

        Raises:
            UserError: it is no port.
        """
        if "MASTER_PORT" not in self.environ:
            return None
        port = self.number("MASTER_PORT")
        if not 0 < port <= LAST_PORT:
            raise UserError(f"MASTER_PORT={port} must be a port from 1 to {LAST_PORT}. {ADVICE}")
        return port

    def address(self) -> str | None:
        """Return MASTER_ADDR, or None if it is not set.

        Raises:
            UserError: it is empty, or has letters that no host name has.
        """
        address = self.environ.get("MASTER_ADDR")
        if address is not None and (not address or not address.isprintable() or " " in address):
            raise UserError(
                f"MASTER_ADDR={address[:80]!r} must be the name or IP address of rank 0's machine. "
                f"{ADVICE}"
            )
        return address


def _read(variables: LauncherVariables) -> Launch:
    names = variables.names
    rank, world_size = variables.number(names.rank), variables.number(names.world_size)
    if world_size > MOST_RANKS:
        raise UserError(
            f"{names.world_size}={world_size} is more than the {MOST_RANKS:,} ranks that a run can "
            f"have. {ADVICE}"
        )
    local_size_name, local_size = _local_size(variables, world_size)
    local_rank = 0
    if local_size > 1 or names.local_rank in variables.environ:
        local_rank = variables.number(names.local_rank)
    _check_below(names.rank, rank, names.world_size, world_size)
    _check_below(names.local_rank, local_rank, local_size_name, local_size)
    if local_size > world_size:
        raise UserError(
            f"{local_size_name}={local_size} contradicts {names.world_size}={world_size}, since a "
            f"machine cannot have more ranks than the run. {ADVICE}"
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
        raise UserError(
            f"{name}={number} contradicts {limit_name}={limit}, since ranks are counted from 0 and "
            f"must be below the number of ranks. {ADVICE}"
        )


def _local_size(variables: LauncherVariables, world_size: int) -> tuple[str, int]:
    """Return (name, value) of the variable with the number of ranks on this machine.

    If the variables are set by hand and this one is missing, all ranks are on this machine.

    Args:
        variables: the variables of the launcher.
        world_size: number of ranks of the run.
    """
    name = variables.names.local_size
    if variables.names is SRUN:
        return name, tasks_on_node(variables.text(name), variables.number("SLURM_NODEID"))
    if variables.names.launcher == "environment" and name not in variables.environ:
        return variables.names.world_size, world_size
    return name, variables.number(name)


def _with_meeting_place(launch: Launch, variables: LauncherVariables) -> Launch:
    """Return ``launch`` with the rendezvous address and port filled in.

    MASTER_ADDR and MASTER_PORT take precedence over the launcher's values, since a cluster's node
    names may not belong to its fast network. Under mpirun each of the two stays None if its
    variable is not set, and ``launch_mpi.py`` finds it later.

    Args:
        launch: launcher, rank and world size of this process.
        variables: the variables of the launcher.
    """
    address, port = variables.address(), variables.port()
    if variables.names is SRUN:
        # On one machine no name has to resolve.
        one_machine = launch.local_size == launch.world_size
        host = "127.0.0.1" if one_machine else first_host(variables.text("SLURM_STEP_NODELIST"))
        job, step = variables.number("SLURM_JOB_ID"), variables.number("SLURM_STEP_ID")
        address, port = address or host, port or port_of_step(job, step)
    elif launch.launcher != "mpirun":
        variables.text("MASTER_ADDR"), variables.text("MASTER_PORT")  # both are needed
    return replace(launch, address=address, port=port)


def _check_variables_set_by_hand(variables: LauncherVariables) -> None:
    """Raise UserError if RANK or WORLD_SIZE contradicts the variables that srun or mpirun set.

    LOCAL_RANK is not checked: scripts set it to 0 where each task sees a single GPU.
    """
    for by_hand, own in (
        ("RANK", variables.names.rank),
        ("WORLD_SIZE", variables.names.world_size),
    ):
        if by_hand in variables.environ and variables.number(by_hand) != variables.number(own):
            launcher = variables.names.launcher
            raise UserError(
                f"{by_hand}={variables.text(by_hand)} contradicts {own}={variables.text(own)}, "
                f"which {launcher} set. Unset RANK and WORLD_SIZE, or start a single task with "
                f"{launcher}."
            )
