"""Which rank of how many: the environments that launchers make, and those that contradict
themselves."""

from collections.abc import Mapping

import pytest

from sparse_lora_dist.distributed.launch import Launch, find_launch
from sparse_lora_dist.distributed.launch_slurm import first_host, port_of_step, tasks_on_node
from sparse_lora_dist.errors import UserError

PLACE = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
TORCHRUN = {
    **BY_HAND,
    **PLACE,
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
DEEPSPEED = {**BY_HAND, **PLACE, "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
# What Open MPI 5.0.11 and MPICH 5.0.2 set.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
HYDRA = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "PMI_FD": "9",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
}
# A batch step, which is sbatch's own script, and a task of srun in it.
SBATCH = {
    "SLURM_JOB_ID": "4217",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = {
    **SBATCH,
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
PMI2 = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "11"}
DAEMON = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
ALONE = Launch(launcher="python")


def found(launcher: str, address: str | None = None, port: int | None = None) -> Launch:
    return Launch(
        launcher=launcher,
        rank=3,
        world_size=4,
        local_rank=1,
        local_size=2,
        address=address,
        port=port,
    )


SLURM_PORT = 10_000 + (4217 * 101 + 1) % 20_000
FOUND: dict[str, tuple[Mapping[str, str], Launch]] = {
    "torchrun": (TORCHRUN, found("torchrun", "n1", 29500)),
    "deepspeed": (DEEPSPEED, found("deepspeed", "n1", 29500)),
    "by hand": (BY_HAND | PLACE | {"LOCAL_WORLD_SIZE": "2"}, found("environment", "n1", 29500)),
    "Open MPI": (OPEN_MPI, found("mpirun")),
    "Open MPI, told where": (OPEN_MPI | PLACE, found("mpirun", "n1", 29500)),
    "MPICH": (HYDRA, found("mpirun")),
    "srun": (SRUN, found("srun", "gpu07", SLURM_PORT)),
    "srun, told where": (SRUN | PLACE, found("srun", "n1", 29500)),
    "srun, told half": (SRUN | {"MASTER_PORT": "1234"}, found("srun", "gpu07", 1234)),
    "srun --mpi=pmi2": (SRUN | PMI2, found("srun", "gpu07", SLURM_PORT)),
    "srun, one GPU a task": (SRUN | {"LOCAL_RANK": "0"}, found("srun", "gpu07", SLURM_PORT)),
    "srun, its numbers by hand too": (
        SRUN | {"RANK": "3", "WORLD_SIZE": "4"},
        found("srun", "gpu07", SLURM_PORT),
    ),
    # The inner one rules.
    "srun torchrun": (SRUN | TORCHRUN, found("torchrun", "n1", 29500)),
    "srun deepspeed": (DAEMON | DEEPSPEED, found("deepspeed", "n1", 29500)),
    "mpirun torchrun": (OPEN_MPI | TORCHRUN, found("torchrun", "n1", 29500)),
    "Open MPI in a Slurm job": (DAEMON | OPEN_MPI, found("mpirun")),
    "MPICH in a Slurm job": (DAEMON | HYDRA, found("mpirun")),
    # One task is no launch.
    "python": ({}, ALONE),
    "sbatch": (SBATCH, ALONE),
    "srun -n 1": (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ALONE),
    "mpirun -n 1": ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, ALONE),
    "by hand in srun -n 1": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "LOCAL_WORLD_SIZE": "2"} | BY_HAND | PLACE,
        found("environment", "n1", 29500),
    ),
    "one rank by hand": (
        {"RANK": "0", "WORLD_SIZE": "1"},
        Launch(launcher="environment"),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    environ, launch = FOUND[name]
    assert find_launch(environ) == launch


def test_by_hand_without_their_number_all_ranks_are_on_this_machine() -> None:
    assert find_launch(BY_HAND | PLACE).local_size == 4


def test_on_one_node_no_name_has_to_resolve() -> None:
    one = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu07"}
    assert find_launch(SRUN | one).address == "127.0.0.1"


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


WRONG: dict[str, tuple[Mapping[str, str], str]] = {
    "half": ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE is not"),
    "other half": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not"),
    "no local rank": (
        without(BY_HAND | PLACE, "LOCAL_RANK"),
        "RANK=3 is set, but LOCAL_RANK is not",
    ),
    "no address": (BY_HAND | {"MASTER_PORT": "1"}, "RANK=3 is set, but MASTER_ADDR is not"),
    "no port": (BY_HAND | {"MASTER_ADDR": "n"}, "RANK=3 is set, but MASTER_PORT is not"),
    "too high": (BY_HAND | PLACE | {"RANK": "4"}, "RANK=4 contradicts WORLD_SIZE=4"),
    "local too high": (
        TORCHRUN | {"LOCAL_RANK": "2"},
        "LOCAL_RANK=2 contradicts LOCAL_WORLD_SIZE=2",
    ),
    "more here than in all": (
        DEEPSPEED | {"LOCAL_SIZE": "8"},
        "LOCAL_SIZE=8 contradicts WORLD_SIZE=4",
    ),
    "a word": (BY_HAND | PLACE | {"RANK": "first"}, "RANK='first' must be a whole number"),
    "nothing": (BY_HAND | PLACE | {"WORLD_SIZE": ""}, "WORLD_SIZE='' must be a whole number"),
    "negative": (TORCHRUN | {"RANK": "-1"}, "RANK='-1' must be a whole number"),
    "port": (OPEN_MPI | {"MASTER_PORT": "tcp"}, "MASTER_PORT='tcp' must be a whole number"),
    "srun and RANK": (
        SRUN | {"RANK": "0", "WORLD_SIZE": "4"},
        "RANK=0 contradicts SLURM_PROCID=3",
    ),
    "srun and WORLD_SIZE": (
        SRUN | {"WORLD_SIZE": "8"},
        "WORLD_SIZE=8 contradicts SLURM_STEP_NUM_TASKS=4",
    ),
    "mpirun and RANK": (
        OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"},
        "RANK=0 contradicts OMPI_COMM_WORLD_RANK=3",
    ),
    "MPICH and WORLD_SIZE": (HYDRA | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 contradicts PMI_SIZE=4"),
    "an mpirun nobody knows": (PMI2, "PMI_SIZE=4 is set, but MPI_LOCALNRANKS is not"),
    "half of Open MPI": (
        {"OMPI_COMM_WORLD_SIZE": "4"},
        "OMPI_COMM_WORLD_SIZE=4 is set, but OMPI_COMM_WORLD_RANK is not",
    ),
    "a node without tasks": (
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4"},
        "SLURM_LOCALID=1 contradicts SLURM_STEP_TASKS_PER_NODE=0",
    ),
    "half of srun": (
        without(SRUN, "SLURM_STEP_NODELIST"),
        "SLURM_STEP_ID=1 is set, but SLURM_STEP_NODELIST is not",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradictions_are_named(name: str) -> None:
    environ, said = WRONG[name]
    with pytest.raises(UserError) as caught:
        find_launch(environ)
    assert str(caught.value).startswith(said)
    assert "Set RANK, " in str(caught.value) or "Unset RANK" in str(caught.value)


def test_what_other_libraries_read() -> None:
    assert find_launch(SRUN).variables() == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(SLURM_PORT),
    }
    # An address left over in the shell is no concern of a run that meets nobody.
    assert "MASTER_ADDR" not in ALONE.variables()


def test_a_shell_in_a_step_is_no_launch() -> None:
    """srun --pty in an allocation of several tasks: nobody else has a terminal, or comes."""
    shell = SRUN | {"SLURM_PTY_PORT": "40001"}
    assert find_launch(shell).launcher == "python"
    assert find_launch(shell | OPEN_MPI).launcher == "mpirun"


def test_in_words() -> None:
    said = find_launch(SRUN).in_words(nodes=2)
    assert said == f"srun: 4 ranks on 2 nodes, meeting at gpu07:{SLURM_PORT}"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-12]", "gpu07"),
        ("gpu[007,009-012],login1", "gpu007"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("gpu[1-2].cluster,n3", "gpu1.cluster"),
        ("a-b.c,n[1-2]", "a-b.c"),
    ],
)
def test_the_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("counts", "each"),
    [("4", [4]), ("2(x2),1", [2, 2, 1]), ("1,3(x2)", [1, 3, 3]), ("2,1(x1),12", [2, 1, 12])],
)
def test_tasks_of_each_node(counts: str, each: list[int]) -> None:
    assert [tasks_on_node(counts, node) for node in range(len(each))] == each


def test_steps_that_may_share_a_node_have_ports_of_their_own() -> None:
    """A hundred jobs after one another, fifty steps each; all below Linux's own ports."""
    ports = [port_of_step(job, step) for job in range(4200, 4300) for step in range(50)]
    assert len(set(ports)) == len(ports)
    assert 10_000 <= min(ports) and max(ports) < 30_000
