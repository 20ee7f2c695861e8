"""Whole runs on real ranks: one curve on any layout, exact resume, and what lies in the run folder.

The model is tiny and random, so what is compared are numbers, not quality.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.optim.learning_rate import LearningRate
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.reference import documents_of, loss_of_documents, whole_model
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import in_full

TRAIN = "tests.work.run:train"
STEP_KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "peak_memory_bytes",
    "live_entries",
    "state_bytes",
    "state_bytes_peak",
    "state_bytes_repacking",
    "statistics_bytes",
    "decision_bytes_received",
}
EXACT = ("step", "loss", "learning_rate", "grad_norm", "tokens", "live_entries", "held_out_loss")
"""What two equal runs have in common; the rest is time and memory."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / "metrics.jsonl")


def exact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: row[k] for k in EXACT if k in row} for row in rows]


def column(folder: Path, key: str) -> list[float]:
    return [row[key] for row in rows_of(folder) if key in row]


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 20 steps on 2 ranks in one go, with dropout."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks(2, TRAIN, flags=long_run(tiny, folder) + ["--trackers", "tensorboard"])
    return folder


def long_run(tiny: TinyRun, folder: Path, **options: object) -> list[str]:
    return tiny.flags(folder, **{"max_steps": 20, "dropout": 0.1, "eval_every": 5} | options)


@pytest.mark.parametrize(
    ("world", "micro_batch", "accumulation"), [in_full(1, 4, 1), in_full(2, 1, 2)]
)
def test_the_loss_curve_does_not_depend_on_the_layout(
    ranks: Ranks,
    tiny: TinyRun,
    whole: Path,
    tmp_path: Path,
    world: int,
    micro_batch: int,
    accumulation: int,
) -> None:
    layout = {"micro_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    ranks(world, TRAIN, flags=long_run(tiny, tmp_path, **layout))
    assert column(tmp_path, "loss") == pytest.approx(column(whole, "loss"), abs=1e-5)
    assert column(tmp_path, "grad_norm") == pytest.approx(column(whole, "grad_norm"), abs=1e-4)
    assert column(tmp_path, "tokens") == column(whole, "tokens")
    assert column(tmp_path, "held_out_loss") == pytest.approx(
        column(whole, "held_out_loss"), abs=1e-5
    )


def test_gradient_checkpointing_changes_nothing(
    ranks: Ranks, tiny: TinyRun, whole: Path, tmp_path: Path
) -> None:
    flags = long_run(tiny, tmp_path, stop_after=8) + ["--gradient_checkpointing"]
    ranks(2, TRAIN, flags=flags)
    assert column(tmp_path, "loss") == pytest.approx(column(whole, "loss")[:8], abs=1e-6)
    assert column(tmp_path, "grad_norm") == pytest.approx(column(whole, "grad_norm")[:8], abs=1e-5)


def test_dropout_is_at_work_while_training_only(
    ranks: Ranks, tiny: TinyRun, whole: Path, tmp_path: Path
) -> None:
    ranks(2, TRAIN, flags=long_run(tiny, tmp_path, dropout=0.0, stop_after=3))
    with_dropout, without = column(whole, "loss"), column(tmp_path, "loss")
    assert without[0] == pytest.approx(with_dropout[0], abs=1e-6), "B is zero at first"
    assert abs(without[2] - with_dropout[2]) > 1e-4


@pytest.mark.parametrize("precision", [in_full("fp32"), "bf16"])
def test_stop_and_resume_is_bit_for_bit_the_run_in_one_go(
    ranks: Ranks, tiny: TinyRun, whole: Path, tmp_path: Path, precision: str
) -> None:
    straight, steps, flags = whole, 20, long_run(tiny, tmp_path / "two")
    if precision == "bf16":
        straight, steps = tmp_path / "one", 10
        ranks(2, TRAIN, flags=long_run(tiny, straight, precision="bf16", max_steps=steps))
        flags += ["--precision", "bf16", "--max_steps", str(steps)]
    ranks(2, TRAIN, flags=[*flags, "--stop_after", str(steps // 2)])
    assert [row["step"] for row in rows_of(tmp_path / "two")] == list(range(steps // 2 + 1))
    ranks(2, TRAIN, flags=[*flags, "--resume", "auto"])

    # The interrupted run has a held-out loss where it ended; one is due there anyway.
    assert exact(rows_of(tmp_path / "two")) == exact(rows_of(straight))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (f / "adapter" / name for f in (straight, tmp_path / "two"))
        assert one.read_bytes() == two.read_bytes()


def test_resume_cuts_metrics_back_and_derives_the_schedule_anew(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, max_steps=8, stop_after=6, save_every=4)
    ranks(2, TRAIN, flags=flags)
    first = rows_of(tmp_path)
    # As after a crash: two steps were logged that no checkpoint holds, and one line is half there.
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')

    longer = tiny.flags(tmp_path, max_steps=12, stop_after="null", resume="auto")
    said = ranks(2, TRAIN, flags=longer)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(13))
    assert rows[:5] == first[:5], "what is known stays as it was"
    rate = LearningRate(name="cosine", peak=1e-2, warmup_steps=0, stages=(12,)).at
    assert [row["learning_rate"] for row in rows[5:]] == [rate(step) for step in range(5, 13)]
    assert "max_steps 8 -> 12" in said[0]
    assert "end at step 12, not 8" in said[0]
    assert said[1] == "", "one rank speaks for all"


def test_resume_from_a_named_checkpoint_into_a_new_folder(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    ranks(2, TRAIN, flags=tiny.flags(tmp_path / "a", max_steps=4, save_every=2))
    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000002"
    ranks(2, TRAIN, flags=tiny.flags(tmp_path / "b", max_steps=4, resume=checkpoint))
    assert exact(rows_of(tmp_path / "b")) == exact(rows_of(tmp_path / "a"))[3:]


def test_a_checkpoint_resumed_into_a_new_folder_without_a_step_left_is_exported(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    ranks(1, TRAIN, flags=tiny.flags(tmp_path / "a", max_steps=4, save_every=2))
    resume = {"resume": tmp_path / "a" / "checkpoints" / "step_00000002", "stop_after": 2}
    (said,) = ranks(1, TRAIN, flags=tiny.flags(tmp_path / "b", max_steps=4, **resume))
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").exists()
    assert "no step was logged" in said


def test_a_finished_run_resumed_only_exports_again(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, max_steps=2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "adapter")
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, max_steps=2, resume="auto"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_metrics_have_the_documented_keys(whole: Path) -> None:
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(21))
    assert set(rows[0]) == {"step", "held_out_loss"}
    for row in rows[1:]:
        due = {"held_out_loss"} if row["step"] % 5 == 0 else set()
        assert set(row) == STEP_KEYS | due
        assert row["tokens_per_s"] > 0 and row["peak_memory_bytes"] > 10**7
        # 7 linears a layer, of 64 x 64 (two), 64 x 32 (two), 64 x 128 (three): in + out times rank.
        assert row["live_entries"] == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert column(whole, "tokens") == sorted(column(whole, "tokens"))
    assert column(whole, "held_out_loss")[-1] < column(whole, "held_out_loss")[0] - 1.0


def test_tensorboard_holds_the_same_numbers(whole: Path) -> None:
    events = event_accumulator.EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    for name in ("loss", "grad_norm", "held_out_loss"):
        written = {e.step: e.value for e in events.Scalars(name)}
        logged = {row["step"]: row[name] for row in rows_of(whole) if name in row}
        assert written == pytest.approx(logged, rel=1e-6)  # TensorBoard stores fp32


def test_the_run_folder_describes_the_run(whole: Path, tiny: TinyRun) -> None:
    again = load_config(["--config", str(whole / "run.yaml")])
    assert again == load_config(long_run(tiny, whole) + ["--trackers", "tensorboard"])
    assert yaml.safe_load((whole / "run.yaml").read_text())["dropout"] == 0.1

    environment = json.loads((whole / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["device"] in ("cpu", "cuda")
    assert environment["packages"]["torch"] == version("torch")
    assert environment["packages"]["deepspeed"] == version("deepspeed")
    assert {"git_commit", "python", "command", "sparse_lora_dist"} <= set(environment)
    assert environment["data"]["data"]["files"] == [str(tiny.data)]
    assert environment["data"]["eval_data"]["unread_columns"] == []


def test_the_summary_names_what_came_out_and_what_to_type_next(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    said, silent = ranks(2, TRAIN, flags=tiny.flags(tmp_path, max_steps=4, stop_after=2))
    summary = said.splitlines()[-6:]
    labels = [line.split()[0] for line in summary]
    assert labels == ["trained", "result", "live", "adapter", "curves", "go"]
    assert "2 of 4 steps" in summary[0] and "2 ranks" in summary[0]
    before, after = column(tmp_path, "held_out_loss")
    assert f"{before:.4f} -> {after:.4f}" in summary[1]
    assert silent == ""

    command = summary[-1].split("launcher/train.py ")[1].split()
    ranks(2, TRAIN, flags=command)
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(5))


def test_every_row_of_an_epoch_once_and_an_exact_last_partial_batch(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    # The learning rate moves nothing, so a row has one loss and one gradient in both runs.
    still = {"max_steps": "null", "num_epochs": 1, "learning_rate": 1e-12}
    ranks(1, TRAIN, flags=tiny.flags(tmp_path / "by_1", micro_batch_size=1, **still))
    ranks(2, TRAIN, flags=tiny.flags(tmp_path / "by_4", **still))
    by_1, by_4 = rows_of(tmp_path / "by_1")[1:], rows_of(tmp_path / "by_4")[1:]
    assert len(by_1) % 4 == 1, "the last batch of 4 must have 1 row and 3 of filler"
    assert len(by_4) == len(by_1) // 4 + 1
    assert by_4[-1]["tokens"] == by_1[-1]["tokens"]
    assert by_4[-1]["tokens"] == documents_of(tiny.data, tiny.model).num_tokens
    assert by_4[-1]["loss"] == pytest.approx(by_1[-1]["loss"], abs=1e-5)
    assert by_4[-1]["grad_norm"] == pytest.approx(by_1[-1]["grad_norm"], rel=1e-5)


def test_a_fraction_of_an_epoch_and_more_than_one(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, max_steps="null", num_epochs=1.5, max_samples=7, log_every=100)
    said = ranks(1, TRAIN, flags=flags)[0]
    rows = int(said.split(" rows of up to 64 tokens")[0].split()[-1])
    assert rows_of(tmp_path)[-1]["step"] == -(-int(-(-rows * 1.5 // 1)) // 2)


@pytest.mark.parametrize(
    ("quantization", "double_quant"), [("nf4", True), in_full("nf4", False), ("none", True)]
)
def test_held_out_loss_of_the_base_is_that_of_the_same_weights_in_transformers(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, quantization: str, double_quant: bool
) -> None:
    options = {"quantization": quantization, "double_quant": str(double_quant).lower()}
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, max_steps=1, **options))
    base = whole_model(tiny.model, quantization=quantization, double_quant=double_quant)
    wanted = loss_of_documents(base, documents_of(tiny.held_out, tiny.model))
    assert column(tmp_path, "held_out_loss")[0] == pytest.approx(wanted, abs=1e-5)


def test_the_three_ways_to_hold_the_base_differ(tiny: TinyRun) -> None:
    documents = documents_of(tiny.held_out, tiny.model)
    ways = [("nf4", True), ("nf4", False), ("none", True)]
    losses = [
        loss_of_documents(whole_model(tiny.model, quantization=q, double_quant=d), documents)
        for q, d in ways
    ]
    assert min(abs(losses[i] - losses[i - 1]) for i in range(3)) > 1e-4


def test_weight_decay_and_a_constant_learning_rate_arrive_at_the_optimizer(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    # B is zero, so A's first gradient is zero: the first step only decays it.
    for name, decay in (("without", 0.0), ("with", 0.5)):
        flags = tiny.flags(tmp_path / name, weight_decay=decay, stop_after=1)
        ranks(2, TRAIN, flags=[*flags, "--lr_schedule", "constant"])
    folders = [tmp_path / name / "adapter" for name in ("without", "with")]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    names = [name for name in weights[0] if "lora_A" in name]
    assert len(names) == 14
    for name in names:
        wanted = weights[0][name] * (1 - 1e-2 * 0.5)
        assert weights[1][name].numpy() == pytest.approx(wanted.numpy(), rel=1e-6)
    flags = tiny.flags(tmp_path / "with", resume="auto", weight_decay=0.5)
    ranks(2, TRAIN, flags=[*flags, "--lr_schedule", "constant"])
    assert column(tmp_path / "with", "learning_rate") == [1e-2] * 4


def test_no_held_out_set_no_trackers_and_rare_logging(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, max_steps=5, log_every=2, eval_data="null")
    ranks(1, TRAIN, flags=flags)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
    assert not any("held_out_loss" in row for row in rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".sparse_lora_dist.json",
        "adapter",
        "attempts.jsonl",
        "checkpoints",
        "environment.json",
        "metrics.jsonl",
        "run.yaml",
    ]


def test_a_resume_that_would_end_before_it_begins_is_refused(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, max_steps=4, resume="auto")
    ranks(1, TRAIN, flags=flags)
    (said,) = ranks(1, "tests.work.run:refusal", flags=[*flags, "--max_steps", "2"])
    assert "step_00000004 is at step 4 already" in said and "Raise --max_steps" in said


def test_tensorboard_shows_each_step_once_after_a_resume(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, max_steps=6, save_every=2) + ["--trackers", "tensorboard"]
    ranks(1, TRAIN, flags=flags)
    for step in ("step_00000004", "step_00000006"):
        shutil.rmtree(tmp_path / "checkpoints" / step)
    ranks(1, TRAIN, flags=[*flags, "--resume", "auto"])
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("world", [in_full(1), in_full(4)])
def test_another_number_of_ranks_goes_on_with_the_same_global_batch(
    ranks: Ranks, tiny: TinyRun, whole: Path, tmp_path: Path, world: int
) -> None:
    ranks(2, TRAIN, flags=long_run(tiny, tmp_path, stop_after=10))
    layout = {"micro_batch_size": 4 // world, "resume": "auto"}
    ranks(world, TRAIN, flags=long_run(tiny, tmp_path, **layout))
    assert column(tmp_path, "loss") == pytest.approx(column(whole, "loss"), abs=1e-4)
    assert column(tmp_path, "tokens") == column(whole, "tokens")
