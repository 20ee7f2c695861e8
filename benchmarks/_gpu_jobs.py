"""Parts of ``gpu_check.py`` that start ``launcher/train.py``, and the facts of the machine."""

import hashlib
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _gpu_runner import LONGEST_ERROR, Note, print_into
from _job import ROOT

PACKAGES = (
    *("torch", "triton", "deepspeed", "transformers", "bitsandbytes", "peft", "accelerate"),
    *("datasets", "numpy", "flash-attn"),
)
METHODS = {
    "lora": {},
    "adalora": {"adalora_begin": 0.0, "adalora_every": 2, "adalora_target_rank": 8},
}
STEPS, MIDDLE = 6, 4
"""Steps of a run, and the one at which the first job of two ends."""
COMMON: dict[str, Any] = {"trackers": "[]", "eval_every": 0, "log_every": 1, "max_steps": STEPS}
RACE = "data race"


def facts(note: Note, *, tiny: bool) -> None:
    """Note what this machine is."""
    started = time.perf_counter()
    import sparse_lora_dist.train  # noqa: F401

    import_s = round(time.perf_counter() - started, 1)
    import torch

    from sparse_lora_dist.distributed import comm

    gpu = comm.on_gpu()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    note(
        versions={name: found for name in PACKAGES if (found := _version(name))},
        python=sys.version.split()[0],
        commit=_said_by("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        device=torch.cuda.get_device_name() if gpu else None,
        device_bytes=properties.total_memory if properties else None,
        driver=_said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        gcc=_said_by("gcc", "-dumpfullversion"),
        nvcc=_said_by("nvcc", "--version"),
        cores=os.cpu_count(),
        import_s=import_s,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said_by(program: str, *words: str) -> str | None:
    """Return the last line that a program prints; None if there is no such program."""
    if shutil.which(program) is None:
        return None
    lines = subprocess.run([program, *words], capture_output=True, text=True).stdout.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def smoke(note: Note, *, tiny: bool, methods: Sequence[str] = tuple(METHODS)) -> None:
    """Train, save and resume on this device, and compare each loss with those of one job on the
    CPU."""
    with tempfile.TemporaryDirectory() as place:
        made: dict[str, Any] = {}
        for method in methods:
            words = _options(Path(place), tiny) | METHODS[method] | {"method": method}
            here, there = Path(place, f"{method}_here"), Path(place, f"{method}_cpu")
            here_words = words | {"output_dir": here, "save_every": 2}
            made[method] = (
                Job(here_words | {"stop_after": MIDDLE}),
                Job(words | {"output_dir": there, "save_every": 0, "device": "cpu"}),
                here_words | {"resume": "auto"},
            )
        for first, reference, _ in made.values():
            wait_for(first, reference)
        second = {method: Job(words) for method, (_, _, words) in made.items()}
        wait_for(*second.values())
        for method, (first, reference, _) in made.items():
            losses, other = second[method].losses(), reference.losses()
            assert len(losses) == len(other) == STEPS, (losses, other)
            most = max(abs(own - its) for own, its in zip(losses, other, strict=True))
            seconds = [first.seconds, second[method].seconds]
            note(method=method, losses=losses, on_cpu=other, most=most, seconds=seconds)


def same_bits(note: Note, *, tiny: bool) -> None:
    """Train twice alike, with --deterministic too if there is such an option, and say whether both
    adapters are the same, byte for byte."""
    from sparse_lora_dist.config.config import Config

    ways: dict[str, dict[str, Any]] = {"as it is": {}}
    if "deterministic" in Config().as_flat_dict():
        ways["deterministic"] = {"deterministic": "true"}
    with tempfile.TemporaryDirectory() as place:
        words = _options(Path(place), tiny) | {"save_every": 0}
        jobs = {
            way: [
                Job(words | more | {"output_dir": Path(place, f"{number}_{len(more)}")})
                for number in range(2)
            ]
            for way, more in ways.items()
        }
        wait_for(*(job for pair in jobs.values() for job in pair))
        for way, pair in jobs.items():
            first, second = (job.digest() for job in pair)
            note(way=way, same=first == second, losses_same=pair[0].losses() == pair[1].losses())


def sanitizer(note: Note, *, tiny: bool) -> None:
    """Train two steps under torch's own search for races between streams."""
    os.environ["TORCH_CUDA_SANITIZER"] = "1"
    with tempfile.TemporaryDirectory() as place:
        words = _options(Path(place), tiny) | {"save_every": 0, "max_steps": 2}
        job = Job(words | {"output_dir": Path(place, "run")})
        job.process.join()
        said = job.log.read_text()
        note(status=job.process.exitcode, races=said.count(RACE), said=said[-LONGEST_ERROR:])
        assert job.process.exitcode == 0


def gpu_tests(note: Note, *, tiny: bool) -> None:
    """Run the tests that are marked gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not full", "-p", "no:cacheprovider"]
    files = ("base_model/test_gpu_load.py", "config/test_ds_configs.py", "optim/test_optim.py")
    done = subprocess.run(
        [*command, *(f"tests/{file}" for file in files)], cwd=ROOT, capture_output=True, text=True
    )
    note(status=done.returncode, said=done.stdout[-LONGEST_ERROR:])
    assert done.returncode == 0


def _options(place: Path, tiny: bool) -> dict[str, Any]:
    """Return options of a run of the embedded model, or of a smaller one that is written first."""
    if not tiny:
        return dict(COMMON)
    from tests.fixtures.tiny_run import write_tiny_run

    made = write_tiny_run(place)
    data = {"model": made.model, "data": made.data, "eval_data": made.held_out}
    return COMMON | data | {"sequence_length": 64, "micro_batch_size": 1}


class Job:
    """``launcher/train.py`` with these options, in a process of its own that is started at once."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.folder = Path(options["output_dir"])
        self.log = self.folder.with_name(f"{self.folder.name}_{options.get('resume')}.txt")
        self.started, self.seconds = time.perf_counter(), 0.0
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        # Forked where the parts are, so that nothing is imported again.
        context = multiprocessing.get_context(os.environ["GPU_CHECK_START"])
        self.process = context.Process(target=_train, args=(words, self.log))
        self.process.start()

    def losses(self) -> list[float]:
        """Return the loss of every step."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for line in lines if "loss" in (row := json.loads(line))]

    def digest(self) -> str:
        """Return a hash of the adapter's file."""
        data = (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        return hashlib.sha256(data).hexdigest()


def wait_for(*jobs: Job) -> None:
    """Wait for the end of each, which must be right."""
    for job in jobs:
        job.process.join()
        job.seconds = round(time.perf_counter() - job.started, 1)
    wrong = [job.log.read_text()[-LONGEST_ERROR:] for job in jobs if job.process.exitcode]
    assert not wrong, "\n".join(wrong)


def _train(words: Iterable[str], log: Path) -> None:
    """The process of a job."""
    print_into(log)
    os.chdir(ROOT)
    sys.argv = ["launcher/train.py", *words]
    runpy.run_path("launcher/train.py", run_name="__main__")
