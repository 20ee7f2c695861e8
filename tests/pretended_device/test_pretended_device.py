"""Runs on a pretended CUDA device (``install.py``): what a GPU would refuse, race or wait for."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_lora_dist.methods import METHODS
from tests.fixtures.tiny_models import save_family
from tests.fixtures.tiny_run import TinyRun
from tests.laws import LAWS
from tests.pretended_device.mistakes import PLANTED
from tests.tiers import some

pytestmark = pytest.mark.usefixtures("processes")

PHASES = ("forward", "backward", "decision and update", "saving")
LAUNCHES = {
    "adalora": 69,
    "cola": 56,
    "increlora": 70,
    "lora": 38,
    "lora_mini": 46,
    "lorta": 33,
    "losa": 72,
    "melora": 56,
    "mora": 146,
    "neat": 75,
    "pst": 85,
    "prilora": 47,
    "roselora": 40,
    "sara": 178,
    "sbora": 38,
    "shira": 50,
    "sora": 59,
}
"""Most launches of a step (forward, backward and update) for each linear, with a seventh of the
layer's attention and norms. ``benchmarks/waits.py`` has the parts."""
STEPS = 12  # of the laws: methods decide several times in them


def found_in(
    folder: Path,
    *runs: tuple[str, list[str]],
    ranks: int = 1,
    mistake: str | None = None,
) -> list[list[dict[str, Any]]]:
    """What each rank found in each run."""
    report = folder / "report.json"
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    job = ["-m", "tests.pretended_device.run", json.dumps(runs), str(report)]
    done = subprocess.run(
        [sys.executable, *command, *job, *([mistake] if mistake else [])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-9000:]
    return [json.loads(report.with_suffix(f".{rank}.json").read_text()) for rank in range(ranks)]


def problems(found: list[list[dict[str, Any]]]) -> list[str]:
    return [problem for rank in found for run in rank for problem in run["problems"]]


def test_a_run_with_all_that_a_step_may_have(tiny: TinyRun, tmp_path: Path) -> None:
    """AdaLoRA with dropout, gradient checkpointing, accumulation, the same bits each time, a
    checkpoint and a resume, and an evaluation of what it wrote."""
    options = {
        "method": "adalora",
        **LAWS["adalora"].on,
        "dropout": 0.1,
        "gradient_checkpointing": "true",
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "eval_every": 4,
        "precision": "bf16",
        "deterministic": "true",
    }
    out = tmp_path / "run"
    first = tiny.flags(out, **options, stop_after=4)
    second = tiny.flags(out, **options, resume="auto")
    judged = [
        f"--model={tiny.model}",
        f"--adapter={out / 'adapter'}",
        f"--eval_data={tiny.held_out}",
        "--metrics=loss,exact",
        "--max_new_tokens=4",
    ]
    found = found_in(tmp_path, ("train", first), ("train", second), ("eval", judged))
    assert problems(found) == []
    assert all(run["launches"] for run in found[0])


def test_an_offloaded_optimizer_on_two_ranks(tiny: TinyRun, tmp_path: Path) -> None:
    options = {"method": "roselora", **LAWS["roselora"].on, "ds_config": "zero3_offload"}
    run = ("train", tiny.flags(tmp_path / "run", **options))
    assert problems(found_in(tmp_path, run, ranks=2)) == []


def test_a_mixture_of_experts(tiny: TinyRun, tmp_path: Path) -> None:
    model = save_family(tmp_path / "model", "mixtral", vocab_size=300)
    for file in tiny.model.glob("token*"):
        (model / file.name).write_bytes(file.read_bytes())
    run = ("train", tiny.flags(tmp_path / "run", model=model, method="lora"))
    assert problems(found_in(tmp_path, run)) == []


@pytest.mark.parametrize(
    ("mistake", "words", "place"),
    [
        ("host mask", "mix", "optim/sparse_adamw.py"),
        ("host generator", "generator of cpu", "adapter/dropout.py"),
        ("no epilogue", "race", "zero3/engine.py"),
        ("no wait for gathers", "race", "sparse_lora_dist/"),
    ],
)
def test_a_planted_mistake_is_found(
    tiny: TinyRun, tmp_path: Path, mistake: str, words: str, place: str
) -> None:
    options = {"method": "roselora", **LAWS["roselora"].on, "dropout": 0.1, "max_steps": 3}
    run = ("train", tiny.flags(tmp_path / "run", **options))
    ranks = 2 if mistake == "no wait for gathers" else 1
    found = problems(found_in(tmp_path, run, ranks=ranks, mistake=mistake))
    assert [problem for problem in found if words in problem and place in problem], found[:5]


def with_layers(tiny: TinyRun, folder: Path, count: int) -> Path:
    """The tiny model with another number of layers."""
    config = AutoConfig.from_pretrained(tiny.model)
    config.num_hidden_layers = count
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in tiny.model.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("method", some(METHODS, "adalora losa prilora roselora"))
def test_the_host_waits_for_no_linear(tiny: TinyRun, tmp_path: Path, method: str) -> None:
    """A step of 4 layers waits as often as one of 2, with a decision, too. A method that writes
    tensors anew gathers one linear after another for that, and waits for each."""
    options = {"method": method, **LAWS[method].on, "max_steps": STEPS, "log_every": STEPS}
    options["deterministic"] = "true"
    runs = []
    for layers in (2, 4):
        model = with_layers(tiny, tmp_path / f"model_{layers}", layers)
        runs.append(("train", tiny.flags(tmp_path / f"run_{layers}", model=model, **options)))
    ((two, four),) = found_in(tmp_path, *runs)
    rewrites = method in ("cola", "losa", "mora", "prilora", "pst", "sara", "shira")
    for phase in PHASES if rewrites else (*PHASES, "decision"):
        few, many = (_own_waits(found["waits"].get(phase, {})) for found in (two, four))
        assert many.total() == few.total(), (phase, many - few)
    launches = [sum(_in_steps(found["launches"]), Counter()).total() for found in (two, four)]
    assert (launches[1] - launches[0]) / 14 / STEPS <= LAUNCHES[method]
    assert not [p for run in (two, four) for p in run["problems"] if "deterministic" in p]


def test_a_copy_per_node_is_made_once(tiny: TinyRun, tmp_path: Path) -> None:
    """hpZ: DeepSpeed waits for each copy that it makes. The base's are made in the first step."""
    engine = json.loads(Path("ds_configs/zero3.json").read_text())
    engine["zero_optimization"] |= {
        "zero_hpz_partition_size": 2,
        "stage3_param_persistence_threshold": 0,
    }
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    waits = []
    for steps in (2, 4):
        options = {"max_steps": steps, "log_every": steps, "ds_config": tmp_path / "engine.json"}
        run = ("train", tiny.flags(tmp_path / f"run_{steps}", **options))
        found = found_in(tmp_path, run, ranks=2)  # in a process of its own, as groups are made once
        assert problems(found) == []
        counted = Counter[str]()
        for phase in found[0][0]["waits"].values():
            counted.update({p: n for p, n in phase.items() if "zero/partition_parameters" in p})
        waits.append(sum(n for p, n in counted.items() if "synchronize" in p))
    assert waits[0] == waits[1] > 0


def test_lengths_of_documents_are_copied_once_a_micro_batch(tiny: TinyRun, tmp_path: Path) -> None:
    """In bf16, whose attention takes them. Checkpointed layers run twice."""
    options = {"precision": "bf16", "gradient_checkpointing": "true"}
    runs = []
    for layers in (2, 4):
        model = with_layers(tiny, tmp_path / f"model_{layers}", layers)
        runs.append(("train", tiny.flags(tmp_path / f"run_{layers}", model=model, **options)))
    found = found_in(tmp_path, *runs)
    assert problems(found) == []
    calls = [
        sum(phase["aten::searchsorted"] for phase in _in_steps(run["launches"])) for run in found[0]
    ]
    assert calls == [4 * 2 * 2, 4 * 4 * 2]  # steps, layers, twice
    for phase in PHASES:
        few, many = (_own_waits(run["waits"].get(phase, {})) for run in found[0])
        assert many.total() == few.total(), (phase, many - few)


def _in_steps(launches: dict[str, dict[str, int]]) -> list[Counter[str]]:
    return [Counter(launches.get(phase, {})) for phase in PHASES[:3]]


def _own_waits(waits: dict[str, int]) -> Counter[str]:
    """Without DeepSpeed's, which are for gathers of before and normally over, and without those of
    eigenvalues, which SaRA's nuclear norm needs of each linear (cuSOLVER reports to the host)."""
    left = (" at deepspeed/", "aten::_linalg_eigh", "optim/moments.py")  # the last: once a flat
    return Counter({p: n for p, n in waits.items() if not any(word in p for word in left)})


def test_every_mistake_is_planted() -> None:
    assert set(PLANTED) == {
        "host mask",
        "host generator",
        "no epilogue",
        "no wait for gathers",
    }
