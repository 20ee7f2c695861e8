"""The launcher as a person starts it: real processes, no environment variable set by hand."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.two_nodes import ADDRESSES, PATH, two_nodes, why_not
from tests.tiers import in_full

pytestmark = pytest.mark.usefixtures("processes")

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENGINE = ["--ds_config", "ds_configs/zero3.json"]
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2"]
TWELVE_ROWS = 12
LAUNCHER_LINE = re.compile(r"\[[-\d :,]+\] \[\w+\] \[(runner|launch|real_accelerator)\.py")
"""What DeepSpeed's launcher says of itself, before and after our program."""
KEPT = ("HOME", "LANG", "TMPDIR", "HF_HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """stdout without the launcher's own lines."""
        return [line for line in self.out.splitlines() if not LAUNCHER_LINE.match(line)]


def begin(command: list[str], cwd: Path = REPOSITORY, **variables: str) -> subprocess.Popen[str]:
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def end(program: subprocess.Popen[str]) -> Ended:
    out, err = program.communicate(timeout=240)
    return Ended(program.returncode, out, err)


def start(command: list[str], cwd: Path = REPOSITORY, **variables: str) -> Ended:
    return end(begin(command, cwd, **variables))


def one_step(tiny: TinyRun, folder: Path, world: int, **options: object) -> list[str]:
    """Flags of a step on the same twelve rows, whatever the number of ranks."""
    size = {"micro_batch_size": TWELVE_ROWS // world, "max_steps": 1}
    return tiny.flags(folder, **size | options)


def free_port() -> str:
    """Two runs on a machine need two ports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def deepspeed(world: int) -> list[str]:
    """The command up to our own options."""
    port = free_port()
    return ["deepspeed", "--num_gpus", str(world), "--master_port", port, "launcher/train.py"]


@pytest.fixture(scope="module")
def reference(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    ranks(1, "tests.work.run:train", flags=one_step(tiny, folder, 1))
    return folder


def check_result(folder: Path, reference: Path) -> None:
    rows, wanted = (read_records(f / "metrics.jsonl") for f in (folder, reference))
    assert rows[1]["loss"] == pytest.approx(wanted[1]["loss"], abs=1e-5)
    assert rows[1]["held_out_loss"] == pytest.approx(wanted[1]["held_out_loss"], abs=1e-5)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def check_plan(ended: Ended, folder: Path, world: int) -> None:
    """The plan of the line "memory" against the peak of all ranks' resident memory, which metrics
    have of the worst rank: no run is said to fit that does not. Under pressure the kernel takes
    back pages of libraries' files, a third of the peak."""
    (planned,) = re.findall(r"^memory    about (\d+\.\d\d) of ", ended.out, re.MULTILINE)
    peak = world * max(row.get("peak_memory_bytes", 0) for row in metrics(folder)) / 1e9
    assert 0.95 < float(planned) / peak < 1.5, (planned, peak)


def metrics(folder: Path) -> list[dict[str, float]]:
    return read_records(folder / "metrics.jsonl")


def check_run(ended: Ended, folder: Path, reference: Path, world: int) -> None:
    assert ended.status == 0, ended.out + ended.err
    check_result(folder, reference)
    check_plan(ended, folder, world)
    assert ended.lines[-6].startswith("trained") and f" {world} rank" in ended.lines[-6]
    for line in ended.lines:
        assert not re.search("warn|deprecat|error|failed", line, re.IGNORECASE), line
    assert not re.search("warning|deprecat|Failed to|Traceback", ended.err), ended.err
    assert "\r" not in ended.out + ended.err  # nobody's bar: the output is no terminal
    assert any(re.match(r"step      1 of 1, loss \d.*, 0:00:00 left$", x) for x in ended.lines)


@pytest.mark.parametrize("world", [2, in_full(4)])
def test_deepspeed(tiny: TinyRun, tmp_path: Path, reference: Path, world: int) -> None:
    ended = start([*deepspeed(world), *ENGINE, *one_step(tiny, tmp_path, world)])
    check_run(ended, tmp_path, reference, world)


def test_torchrun(tiny: TinyRun, tmp_path: Path, reference: Path) -> None:
    command = [*TORCHRUN, "launcher/train.py", *ENGINE]
    ended = start(command + one_step(tiny, tmp_path, 2))
    check_run(ended, tmp_path, reference, 2)


def test_plain_python_from_another_folder(tiny: TinyRun, tmp_path: Path, reference: Path) -> None:
    command = ["python", str(REPOSITORY / "launcher" / "train.py")]
    command += ["--ds_config", str(REPOSITORY / "ds_configs" / "zero3.json")]
    # A relative --output_dir lies where the person stands.
    ended = start(command + one_step(tiny, Path("run"), 1), cwd=tmp_path)
    check_run(ended, tmp_path / "run", reference, 1)


@pytest.mark.usefixtures("full")
def test_a_hub_id_is_found_in_the_cache_of_a_machine_without_network(
    tiny: TinyRun, tmp_path: Path, reference: Path
) -> None:
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(tiny.model, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    flags = one_step(tiny, tmp_path / "run", 2, model="org/tiny")
    cache = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ended = start([*TORCHRUN, "launcher/train.py", *ENGINE, *flags], **cache)
    assert ended.status == 0, ended.err
    loss, wanted = (read_records(f / "metrics.jsonl")[1] for f in (tmp_path / "run", reference))
    assert loss["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"


# --- several nodes, MPI, restarts ---------------------------------------------------------------


def hostfile(folder: Path, hosts: Iterable[str]) -> str:
    """One rank on each host."""
    file = folder / "hostfile"
    file.write_text("".join(f"{host} slots=1\n" for host in hosts))
    return str(file)


@pytest.mark.usefixtures("full")
def test_deepspeed_started_on_each_node_by_hand(
    tiny: TinyRun, tmp_path: Path, reference: Path
) -> None:
    common = ["deepspeed", "--hostfile", hostfile(tmp_path, ("n1", "n2")), "--no_ssh"]
    common += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    own = ["launcher/train.py", *ENGINE, *one_step(tiny, tmp_path / "run", 2)]
    nodes = [
        begin([*common, "--node_rank", str(rank), *own], OMP_NUM_THREADS="1") for rank in (0, 1)
    ]
    first, second = (end(node) for node in nodes)
    assert first.status == second.status == 0, first.err + second.err
    assert "deepspeed: 2 ranks on 2 nodes, meeting at 127.0.0.1:" in first.out
    check_result(tmp_path / "run", reference)


@pytest.mark.usefixtures("full")
def test_deepspeed_over_ssh_on_two_nodes(tiny: TinyRun, tmp_path: Path, reference: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    # This machine's name is the same on both, and no address that the other reaches.
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0")
    command = ["deepspeed", "--hostfile", hostfile(tmp_path, ADDRESSES)]
    command += [str(REPOSITORY / "launcher" / "train.py")]
    command += ["--ds_config", str(REPOSITORY / "ds_configs" / "zero3.json")]
    command += one_step(tiny, tmp_path / "run", 2)
    with two_nodes(tmp_path) as on_the_first:
        ended = start([*on_the_first, *command], cwd=tmp_path, PATH=f"{tmp_path}:{BIN}:{PATH}")
    assert ended.status == 0, ended.out + ended.err
    assert f"deepspeed: 2 ranks on 2 nodes, meeting at {ADDRESSES[0]}:29500" in ended.out
    check_result(tmp_path / "run", reference)


def same_end(folder: Path, other: Path, step: int) -> None:
    """Bit for bit, all that trained and its moments. Generators differ: workers of ``ranks`` have a
    past."""
    for rank in (0, 1):
        file = Path("checkpoints", f"step_{step:08d}", f"rank_{rank:05d}.safetensors")
        ours, theirs = load_file(folder / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"rng/cpu"}:
            assert torch.equal(ours[name], theirs[name]), name


def test_mpirun_trains_and_resumes(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    ranks(2, "tests.work.run:train", flags=tiny.flags(whole, max_steps=2))
    # Root is for CI's containers, --oversubscribe for machines of one core.
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", "python"]
    command += ["launcher/train.py", *ENGINE, *tiny.flags(run, max_steps=2)]
    for more in (["--stop_after", "1"], ["--resume", "auto"]):
        ended = start([*command, *more], OMP_NUM_THREADS="1")
        assert ended.status == 0, ended.out + ended.err
        assert ended.lines[0].startswith("launch    mpirun: 2 ranks on 1 node, meeting at ")
    same_end(run, whole, 2)


@pytest.mark.usefixtures("full")
def test_an_mpi_that_is_not_that_of_mpirun_is_named(tiny: TinyRun, tmp_path: Path) -> None:
    """What MPICH's mpirun says to a rank whose mpi4py found Open MPI."""
    said = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    command = ["python", "launcher/train.py", *ENGINE, *one_step(tiny, tmp_path, 2)]
    ended = start(command, **said)
    assert ended.status == 2
    said_once(ended, "mpirun says rank 0 of 2, and mpi4py says rank 0 of 1")


def test_an_environment_that_contradicts_itself_is_refused() -> None:
    ended = start(["python", "launcher/train.py", "--help"], WORLD_SIZE="2")
    assert (ended.status, ended.out) == (2, "")
    said_once(ended, "WORLD_SIZE=2 is set, but RANK is not")


@pytest.mark.usefixtures("full")
def test_torchrun_starts_all_ranks_again_when_one_is_killed(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """Two nodes of a rank each, as far as torchrun can tell: each counts restarts for itself."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    size = {"max_steps": 40, "save_every": 5}
    ranks(2, "tests.work.run:train", flags=tiny.flags(whole, **size))
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}"]
    command += ["launcher/train.py", *ENGINE, *tiny.flags(run, **size, resume="auto")]
    # Each would take all cores of what it believes to be its own machine.
    nodes = [begin(command, OMP_NUM_THREADS="1") for _ in range(2)]
    while not (run / "checkpoints" / "step_00000005").exists():
        assert [node.poll() for node in nodes] == [None, None], end(nodes[0]).err
        time.sleep(0.02)
    started = [child for node in nodes for child in psutil.Process(node.pid).children()]
    (second,) = (rank for rank in started if rank.environ()["RANK"] == "1")
    second.kill()
    ended = [end(node) for node in nodes]
    assert [node.status for node in ended] == [0, 0], ended
    said = ended[0].out + ended[1].out
    assert said.count("launch    torchrun: 2 ranks on 2 nodes, meeting at ") == 2
    assert f"resumes   {run}/checkpoints/step_" in said
    same_end(run, whole, 40)
    rows, wanted = (read_records(f / "metrics.jsonl") for f in (run, whole))
    assert [row["loss"] for row in rows[1:]] == [row["loss"] for row in wanted[1:]]


# --- what goes wrong ----------------------------------------------------------------------------


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def truncated(tiny: TinyRun, tmp_path: Path) -> Path:
    model = copy_of(tiny.model, tmp_path / "cut")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return model


def said_once(ended: Ended, message: str) -> None:
    everything = ended.out + ended.err
    assert everything.count("error: ") == 1, everything
    assert everything.count(message) == 1, everything


@pytest.mark.usefixtures("full")
def test_two_ranks_end_together_with_one_message(tiny: TinyRun, tmp_path: Path) -> None:
    flags = one_step(tiny, tmp_path / "run", 2, model=truncated(tiny, tmp_path))
    ended = start([*deepspeed(2), *ENGINE, *flags])
    assert ended.status != 0
    said_once(ended, "is cut short")
    assert "Traceback" not in ended.out + ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("full")  # its kind: tests/reports/test_a_refusal_reaches_the_screen.py
def test_torchrun_ends_with_one_message(tiny: TinyRun, tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text(tiny.data.read_text() + '{"prompt": "a", "resp\n')
    flags = one_step(tiny, tmp_path / "run", 2, data=data)
    ended = start([*TORCHRUN, "launcher/train.py", *ENGINE, *flags])
    assert ended.status != 0
    said_once(ended, f"{data}:41: This line is not valid JSON")


@pytest.mark.usefixtures("full")
def test_a_mistake_is_status_2_and_debug_shows_where(tiny: TinyRun, tmp_path: Path) -> None:
    flags = one_step(tiny, tmp_path / "run", 1, rank=33)
    command = ["python", "launcher/train.py", *ENGINE, *flags]
    quiet, loud = start(command), start([*command, "--debug"])
    assert quiet.status == loud.status == 2
    said_once(quiet, "--rank 33 is larger than in_features or out_features")
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err and "check_ranks" in loud.err
