"""A job that may use a part of its machine: its memory is planned, and its threads are counted, by
what it was given."""

from pathlib import Path

import pytest

from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.distributed.launch_slurm import memory_of_node
from sparse_lora_dist.distributed.threads import cpus_of_rank, own_cpus, threads_of_rank
from sparse_lora_dist.plan import check
from sparse_lora_dist.plan.advice import Limits, Need
from sparse_lora_dist.plan.host_memory import mem_option, smallest
from sparse_lora_dist.plan.output import Outcome, as_text
from sparse_lora_dist.plan.plan_options import load_request
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks
from sparse_lora_dist.plan.shapes import shapes_of
from sparse_lora_dist.system.cgroups import cpu_limit, memory_limit

GB = 10**9


def process(
    folder: Path, cgroup: str, mounts: list[tuple[str, str, str]], files: dict[str, str]
) -> Path:
    """A process of a made machine.

    Args:
        folder: where it is made.
        cgroup: content of /proc/self/cgroup.
        mounts: (root, folder, kind and options) of each mounted tree of cgroups.
        files: path below ``folder`` -> content.
    """
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    lines = ["21 1 8:1 / / rw - ext4 /dev/x rw"]
    for i, (root, place, kind) in enumerate(mounts, start=30):
        escaped = str(folder / place).replace(" ", "\\040")
        lines.append(f"{i} 20 0:{i} {root} {escaped} rw shared:1 - {kind}")
    (folder / "mountinfo").write_text("\n".join(lines) + "\n")
    (folder / "cgroup").write_text(cgroup)
    return folder


def test_version_2_the_smallest_limit_of_all_groups_around_counts(tmp_path: Path) -> None:
    files = {
        "fs cg/slurm/job_7/memory.max": f"{3 * GB}",
        "fs cg/slurm/job_7/cpu.max": "400000 100000",
        "fs cg/slurm/job_7/step_0/memory.max": "max",
        "fs cg/slurm/job_7/step_0/cpu.max": "max 100000",
        "fs cg/slurm/memory.max": f"{9 * GB}",
        "fs cg/slurm/job_8/memory.max": "1",  # another job's
    }
    (tmp_path / "fs cg/slurm/job_7/step_0/task_0").mkdir(parents=True)
    mounts = [("/", "fs cg", "cgroup2 cgroup2 rw")]
    own = process(tmp_path, "0::/slurm/job_7/step_0/task_0\n", mounts, files)
    assert (memory_limit(own), cpu_limit(own)) == (3 * GB, 4.0)


def test_version_1_has_a_tree_for_each_resource(tmp_path: Path) -> None:
    files = {
        "m/slurm/uid_1/job_7/memory.limit_in_bytes": "891289600",
        "m/slurm/uid_1/memory.limit_in_bytes": f"{2**63 - 4096}",
        "c/cpu.cfs_quota_us": "-1",
        "c/cpu.cfs_period_us": "100000",
        "c/slurm/cpu.cfs_quota_us": "150000",
        "c/slurm/cpu.cfs_period_us": "100000",
        "u/memory.max": "5",
    }
    mounts = [
        ("/", "m", "cgroup cgroup rw,memory"),
        ("/", "c", "cgroup cgroup rw,cpu,cpuacct"),
        ("/", "u", "cgroup2 cgroup2 rw"),
    ]
    cgroup = "9:name=systemd:/\n4:memory:/slurm/uid_1/job_7\n2:cpu,cpuacct:/slurm\n"
    own = process(tmp_path, cgroup, mounts, files)
    assert (memory_limit(own), cpu_limit(own)) == (891289600, 1.5)


@pytest.mark.parametrize("cgroup", ["0::/docker/abc\n", "0::/\n", "0::/../../x\n", "0::/gone\n"])
def test_a_container_sees_its_own_group_only(tmp_path: Path, cgroup: str) -> None:
    mounts = [("/docker/abc", "cg", "cgroup2 cgroup2 rw")]
    own = process(tmp_path, cgroup, mounts, {"cg/memory.max": f"{2 * GB}", "cg/cpu.max": "1 2"})
    assert (memory_limit(own), cpu_limit(own)) == (2 * GB, 0.5)


@pytest.mark.parametrize("cgroup", ["", "0::/\n", "garbage\n", "4:memory:/a\n"])
def test_without_a_limit_there_is_none(tmp_path: Path, cgroup: str) -> None:
    own = process(tmp_path, cgroup, [("/", "cg", "cgroup2 cgroup2 rw")], {"cg/memory.max": "max"})
    assert (memory_limit(own), cpu_limit(own)) == (None, None)
    assert memory_limit(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_MEM_PER_NODE": "850"}, (850 * 2**20, "SLURM_MEM_PER_NODE")),
        ({"SLURM_MEM_PER_NODE": "0"}, None),  # all of the node
        (
            {"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "4"},
            (2000 * 2**20, "SLURM_MEM_PER_CPU"),
        ),
        (
            {"SLURM_MEM_PER_GPU": "500", "SLURM_GPUS_ON_NODE": "2"},
            (1000 * 2**20, "SLURM_MEM_PER_GPU"),
        ),
        ({"SLURM_MEM_PER_CPU": "500"}, None),
        ({"SLURM_MEM_PER_NODE": "lots"}, None),
        ({}, None),
    ],
)
def test_slurm_says_how_much_memory_a_job_has(
    variables: dict[str, str], found: tuple[int, str] | None
) -> None:
    assert memory_of_node({"SLURM_JOB_ID": "7", **variables}) == found
    assert memory_of_node(variables) is None  # a shell that kept a variable is no job


@pytest.mark.parametrize(
    ("launcher", "variables", "cpus"),
    [
        ("srun", {"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "16"}, 3),
        ("srun", {"SLURM_CPUS_ON_NODE": "16"}, 8),
        ("torchrun", {"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "16"}, 8),
        ("python", {"SLURM_CPUS_ON_NODE": "x"}, None),
        ("srun", {"SLURM_CPUS_PER_TASK": "0"}, None),
    ],
)
def test_slurm_says_how_many_cpus_a_rank_has(
    launcher: str, variables: dict[str, str], cpus: int | None
) -> None:
    launch = Launch(launcher=launcher, world_size=2, local_size=2)
    assert cpus_of_rank({"SLURM_JOB_ID": "7", **variables}, launch) == cpus
    assert cpus_of_rank(variables, launch) is None


@pytest.mark.parametrize(
    ("masks", "cpus"),
    [
        ([{0, 1, 2, 3}] * 2, 2),  # nobody is bound
        ([{0, 1}, {2, 3}], 2),  # each is bound
        ([{0, 1, 2, 3}, {4, 5, 6, 7}], 4),
        ([{0, 1, 2, 3}] * 2 + [{4, 5, 6, 7}] * 2, 2),  # bound to sockets
        ([{0}] * 3, 1),
        ([{0, 1, 2, 3}, {3}], 3),
    ],
)
def test_ranks_that_may_use_the_same_cpus_share_them(masks: list[set[int]], cpus: int) -> None:
    assert own_cpus(masks[0], masks) == cpus


@pytest.mark.parametrize(
    ("share", "variables", "quota", "threads"),
    [
        (16, {}, None, 16),
        (16, {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}, None, 1),
        (2, {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}, None, 2),
        (16, {}, 6.5, 3),  # of two ranks in a container
        (16, {}, 0.5, 1),
        (16, {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "4"}, 0.5, None),
    ],
)
def test_the_smallest_share_counts_and_the_users_number_wins(
    share: int, variables: dict[str, str], quota: float | None, threads: int | None
) -> None:
    launch = Launch(launcher="srun", world_size=4, local_size=2)
    assert threads_of_rank(launch, share, environ=variables, quota=quota) == threads


@pytest.mark.parametrize(
    ("cgroup", "slurm", "found", "owner"),
    [
        (None, None, 24 * GB, "this machine"),
        (GB, None, GB, "this job (limit of its cgroup)"),
        (30 * GB, (2 * GB, "SLURM_MEM_PER_NODE"), 2 * GB, "this job (SLURM_MEM_PER_NODE)"),
    ],
)
def test_the_smallest_of_machine_group_and_slurm_counts(
    cgroup: int | None, slurm: tuple[int, str] | None, found: int, owner: str
) -> None:
    least = smallest(free=24 * GB, cgroup=cgroup, slurm=slurm)
    assert (least.bytes, least.owner) == (found, owner)


def test_two_ranks_of_the_embedded_model_do_not_fit_into_850_mb() -> None:
    """They peaked at 1.06 GB of a cgroup, which counts pages of files that they share once."""
    request = load_request(
        "--gpu_memory 0 --world_size 2 --host_memory 850MB --max_steps 12".split()
    )
    ranks = Ranks(world_size=2, on_gpu=False)
    engine = PlannedEngine.of(request.engine)
    outcome = Outcome(
        shapes=shapes_of(request.config), engine=engine, ranks=ranks, plan=request.plan
    )
    assert outcome.fits is False
    assert 1.06 * GB < outcome.need.host < 3 * GB  # with CUDA's libraries 0.7 more
    assert f"sbatch {mem_option(outcome.need.host)}" in as_text(outcome)


def test_the_advised_memory_is_a_tenth_more_in_slurms_megabytes() -> None:
    assert mem_option(GB) == "--mem=1100M"  # 1.1 GB are 1049 MiB
    assert mem_option(95 * 2**20) == "--mem=200M"


def test_the_memory_line_says_whose_memory_it_is_and_what_to_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need, limits = Need(gpu=0, host=GB), Limits(gpu=0, host=850 * 2**20)
    ranks = Ranks(world_size=2, on_gpu=False)
    said = check.need_text(need, limits, ranks, "this job (SLURM_MEM_PER_NODE)")
    assert said == "about 1.00 of 0.89 GB of the memory of this job (SLURM_MEM_PER_NODE)"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "Or ask for more: sbatch --mem=1100M" in check.advice(need, limits)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "sbatch" not in check.advice(need, limits)
