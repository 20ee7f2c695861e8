"""Where the ranks of mpirun meet: the one thing that it does not put into the environment."""

import socket
from dataclasses import replace

from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.errors import UserError


def with_meeting_place(launch: Launch) -> Launch:
    """``launch`` with rank 0's address and port, which it tells the others: mpirun may not have
    handed its environment on to other machines. A collective of MPI, which is not used any further.

    Raises:
        UserError: mpi4py is not there, finds no MPI, or is at home in another MPI than mpirun.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter: no MPI library to load
        raise UserError(
            f"mpirun started {launch.world_size} ranks, which find each other by mpi4py: {error}. "
            "pip install mpi4py, with the MPI that mpirun belongs to in the same environment, or "
            "start with torchrun or deepspeed."
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):
        raise UserError(
            f"mpirun says rank {launch.rank} of {launch.world_size}, and mpi4py rank "
            f"{world.Get_rank()} of {world.Get_size()}: it uses another MPI than mpirun, "
            f"{MPI.Get_library_version().split(',')[0].strip()}. Install mpi4py for the MPI that "
            "mpirun belongs to (pip install --no-binary mpi4py mpi4py), or start with its mpirun."
        )
    address, port = world.bcast(_here(launch))
    MPI.Finalize()
    return replace(launch, address=address, port=port)


def _here(launch: Launch) -> tuple[str, int]:
    """What was said by hand, else this machine's name, and a port that is free on it."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    # A name need not resolve where nobody else has to find it.
    alone = launch.local_size == launch.world_size
    name = "127.0.0.1" if alone else socket.gethostname()
    return launch.address or name, launch.port or port
