"""Find the rendezvous address of ranks that mpirun started.

mpirun sets rank and world size in the environment, but no address.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import replace

from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.errors import UserError


def with_meeting_place(launch: Launch) -> Launch:
    """Return ``launch`` with rank 0's address and port, broadcast by MPI. Collective.

    If the user set the address or port for rank 0 (MASTER_ADDR, MASTER_PORT), these are broadcast,
    since mpirun may not pass its environment to other machines. MPI is shut down afterwards. All
    other communication uses torch.distributed.

    Args:
        launch: rank and world size of this process, from mpirun's environment variables.

    Raises:
        UserError: mpi4py is not installed, finds no MPI library, or uses another MPI than mpirun.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library to load
        raise UserError(
            f"mpirun started {launch.world_size} ranks, which need mpi4py to find each other, but "
            f"mpi4py cannot be imported: {error}. Install mpi4py (pip install mpi4py) in the "
            "environment that has mpirun's MPI, or start with torchrun or deepspeed.",
            shared=True,
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):
        raise UserError(
            f"mpirun says rank {launch.rank} of {launch.world_size}, and mpi4py says rank "
            f"{world.Get_rank()} of {world.Get_size()}. So mpi4py uses another MPI than mpirun: "
            f"{MPI.Get_library_version().split(',')[0].strip()}. {_remedy(os.environ)}",
            shared=True,
        )
    address, port = world.bcast(_here(launch))
    MPI.Finalize()
    return replace(launch, address=address, port=port)


def _remedy(environ: Mapping[str, str]) -> str:
    """Return what to do if mpi4py uses another MPI than mpirun.

    Args:
        environ: the environment variables of this process, by which mpirun's MPI is recognised.
    """
    name, abi, library, compiler = "MPICH or Intel MPI", "mpich", "libmpi.so.12", "mpicc.mpich"
    if "OMPI_COMM_WORLD_SIZE" in environ:
        name, abi, library, compiler = "Open MPI", "openmpi", "libmpi.so.40", "mpicc.openmpi"
    return (
        f"mpirun is that of {name}. Set MPI4PY_MPIABI={abi}, and add the folder of its {library} "
        "to LD_LIBRARY_PATH. Or build mpi4py with that MPI's own compiler, which the mpicc in PATH "
        f"need not be: MPICC={compiler} pip install --force-reinstall --no-binary mpi4py mpi4py. "
        "Or start with the mpirun of mpi4py's MPI, torchrun or deepspeed."
    )


def _here(launch: Launch) -> tuple[str, int]:
    """Return (address, port) as the user set them, or else this machine's name and a free port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    # On one machine no name has to resolve.
    one_machine = launch.local_size == launch.world_size
    name = "127.0.0.1" if one_machine else socket.gethostname()
    return launch.address or name, launch.port or port
