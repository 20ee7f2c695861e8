"""What a method's options do to a real run: stages, 8-bit moments, bf16, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.methods.shared.bit_masks import unpack
from sparse_lora_dist.optim.learning_rate import LearningRate
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.laws import LAWS
from tests.tiers import in_full
from tests.training.test_laws import saved

TRAIN, REFUSAL = "tests.work.run:train", "tests.work.run:refusal_unread"
STAGES: dict[str, object] = {
    "method": "sora",
    "sora_lambdas": (0.5, 1.0, 4.0),
    "max_steps": 18,
    "warmup_steps": 2,
    "micro_batch_size": 3,
}


def test_each_stage_has_its_schedule_its_checkpoint_and_its_row(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    said, _ = ranks(2, TRAIN, flags=tiny.flags(tmp_path, **STAGES, sora_every=5))
    # Through its stages, it cannot go on with more steps: what is printed must not say so.
    last = said.splitlines()[-1]
    assert last.split()[:2] == ["go", "on"] and "--max_steps" not in last
    assert "prune less" in last, "the last lambda leaves nothing"
    stages = read_records(tmp_path / "stages.jsonl")
    assert [(row["stage"], row["step"], row["lambda"]) for row in stages] == [
        (1, 6, 0.5),
        (2, 12, 1.0),
        (3, 18, 4.0),
    ]
    checkpoints = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000006", "step_00000012", "step_00000018"]
    rows = {row["step"]: row for row in read_records(tmp_path / "metrics.jsonl")}
    lambdas = [rows[s]["lambda"] for s in range(1, 19)]
    assert lambdas == [0.5] * 6 + [1.0] * 6 + [4.0] * 6
    rate = LearningRate(name="cosine", peak=1e-2, warmup_steps=2, stages=(6, 12, 18))
    assert [rows[s]["learning_rate"] for s in range(1, 19)] == [rate.at(s) for s in range(1, 19)]
    for row in stages:
        steps = range(row["step"] - 5, row["step"] + 1)
        assert row["loss"] == pytest.approx(sum(rows[s]["loss"] for s in steps) / 6)
        assert row["learning_rate"] == pytest.approx(sum(rate.at(s) for s in steps) / 6)
        assert row["held_out_loss"] == rows[row["step"]]["held_out_loss"]
        gates = {n: g for n, g in saved(tmp_path, "master", row["step"]).items() if "gate" in n}
        open_gates = sum(int((g != 0).sum()) for n, g in gates.items() if n.endswith("lora_gate"))
        assert row["live_ranks"] == open_gates
    assert stages[0]["live_ranks"] > stages[2]["live_ranks"]


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("reset", [False, True])
def test_a_stage_keeps_or_resets_the_moments_and_resumes_bit_for_bit(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, reset: bool
) -> None:
    options = STAGES | {"sora_reset_moments": reset}
    ranks(2, TRAIN, flags=tiny.flags(tmp_path / "straight", **options, save_every=7))
    for stop in ({"stop_after": 6}, {"stop_after": 9, "resume": "auto"}, {"resume": "auto"}):
        ranks(2, TRAIN, flags=tiny.flags(tmp_path / "parts", **options, **stop))
    for key in ("master", "exp_avg", "exp_avg_sq", "born"):
        straight, parts = (saved(tmp_path / n, key, 18) for n in ("straight", "parts"))
        assert all(torch.equal(straight[n], parts[n]) for n in straight), key
    for name in ("stages", "decisions"):
        straight, parts = (
            read_records(tmp_path / n / f"{name}.jsonl") for n in ("straight", "parts")
        )
        assert straight == parts
    # After step 7, the first of the second stage, everything is born at 6, or was at 0.
    born = torch.cat(list(saved(tmp_path / "straight", "born", 7).values()))
    assert (born == (6 if reset else 0)).all()


def test_released_stages_run_at_rate_zero(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    options = STAGES | {"sora_preset": "released", "sora_lambdas": (0.0, 0.1), "max_steps": 8}
    said, _ = ranks(2, TRAIN, flags=tiny.flags(tmp_path, **options, save_every=4))
    assert f"--init_adapter {tmp_path}/adapter" in said.splitlines()[-1]
    rates = [row["learning_rate"] for row in read_records(tmp_path / "metrics.jsonl")[1:]]
    assert all(r > 0 for r in rates[:4]) and rates[4:] == [0.0] * 4
    before, after = saved(tmp_path, "master", 4), saved(tmp_path, "master", 8)
    for name, w in before.items():
        assert torch.equal(w, after[name]) == (not name.endswith("lora_gate")), name


@pytest.mark.parametrize("name", [in_full("roselora"), "adalora"])
def test_moments_of_8_bits_resume_bit_for_bit_and_cost_a_quarter(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    options = {"method": name, "max_steps": 12, "micro_batch_size": 3, "rank": 16} | LAWS[name].on
    runs = {"full": {}, "eight": {"moment_bits": 8}, "parts": {"moment_bits": 8, "stop_after": 7}}
    for folder, more in runs.items():
        ranks(2, TRAIN, flags=tiny.flags(tmp_path / folder, **options | more))
    resumed = options | {"moment_bits": 8, "resume": "auto"}
    ranks(2, TRAIN, flags=tiny.flags(tmp_path / "parts", **resumed))
    for key in ("master", "live", "exp_avg", "exp_avg_sq"):
        straight, parts = (saved(tmp_path / n, key, 12) for n in ("eight", "parts"))
        assert all(torch.equal(straight[n], parts[n]) for n in straight), key
    full, eight = (read_records(tmp_path / n / "metrics.jsonl") for n in ("full", "eight"))
    assert eight[1]["state_bytes"] < 0.35 * full[1]["state_bytes"]
    assert eight[-1]["loss"] == pytest.approx(full[-1]["loss"], abs=0.3)


@pytest.mark.parametrize("name", ["roselora", in_full("sora"), in_full("increlora"), "adalora"])
def test_what_died_is_still_zero_ten_steps_later_under_bf16(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    """In the masters and in the copy that forward gathers. Nothing is decided any more, so nothing
    would be zeroed again, nor would anybody complain."""
    last = {
        "roselora": {"roselora_begin": 0.2, "roselora_end": 0.5},
        "sora": {"sora_every": 12},
        "increlora": {},
        "adalora": {"adalora_final": 0.5},
    }
    options = {"method": name, "max_steps": 24, "stop_after": 22, "save_every": 3, "rank": 6}
    options |= {"micro_batch_size": 3, "precision": "bf16"} | LAWS[name].on | last[name]
    copies = ranks(2, "tests.work.run:trained_live_copy", flags=tiny.flags(tmp_path, **options))
    assert read_records(tmp_path / "decisions.jsonl")[-1]["step"] == 12
    lived = [saved(tmp_path, "live", step) for step in (3, 6, 9, 12)]
    before, decided, after = (saved(tmp_path, "master", step) for step in (3, 12, 22))
    num_died = 0
    for tensor, w in after.items():
        # What never lived keeps its first value, but for lambdas: those go with their reserves.
        ever = torch.stack([live[tensor] for live in lived]).any(0) | ("lambda" in tensor)
        died = ever & ~lived[-1][tensor]
        num_died += int((before[tensor][died] != 0).sum())
        assert (w[died] == 0).all(), tensor
        for copy in copies:
            assert (copy[tensor].flatten()[died] == 0).all(), tensor
            assert torch.equal(copy[tensor].flatten(), w.to(torch.bfloat16)), tensor
    assert num_died > 0
    assert any((decided[tensor] != w).any() for tensor, w in after.items())


def test_a_rank_that_grows_never_holds_the_state_of_its_capacity(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    options = {"method": "increlora", "max_steps": 20, "rank": 16, "increlora_target_rank": 4.0}
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, **options))
    last = read_records(tmp_path / "metrics.jsonl")[-1]
    dense = 8 * sum(t.numel() for t in saved(tmp_path, "master", 20).values()) / 2
    assert last["state_bytes_peak"] < 0.6 * dense


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(
    "options",
    [
        {"method": "increlora", "increlora_score": "delta", "increlora_every": 2},
        {"method": "increlora", "increlora_preset": "released", "increlora_every": 2},
        {"method": "roselora", "roselora_preset": "released", "roselora_keep": 0.2},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_other_rules_resume_bit_for_bit_and_accumulate(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, options: dict[str, object]
) -> None:
    options = options | {"max_steps": 12, "micro_batch_size": 4, "max_grad_norm": 0}
    runs: dict[str, dict[str, object]] = {
        "straight": {},
        "parts": {"stop_after": 5},
        "accumulated": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    for folder, more in runs.items():
        ranks(2, TRAIN, flags=tiny.flags(tmp_path / folder, **options | more))
    ranks(2, TRAIN, flags=tiny.flags(tmp_path / "parts", **options, resume="auto"))
    for key in ("master", "live", "exp_avg_sq"):
        straight, parts = (saved(tmp_path / n, key, 12) for n in ("straight", "parts"))
        assert all(torch.equal(straight[n], parts[n]) for n in straight), key
    straight, accumulated = (
        read_records(tmp_path / n / "metrics.jsonl")[1:] for n in ("straight", "accumulated")
    )
    # The delta score takes each micro-batch's gradient by itself, so it may choose otherwise.
    if options.get("increlora_score") is None and "increlora" not in str(options["method"]):
        for a, b in zip(straight, accumulated, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    decided = read_records(tmp_path / "accumulated" / "decisions.jsonl")
    assert [r["step"] for r in decided] == [
        r["step"] for r in read_records(tmp_path / "straight" / "decisions.jsonl")
    ]


@pytest.mark.parametrize("engine", [in_full("zero3_offload"), "zero3_hpz"])
def test_decisions_are_the_same_with_masters_on_the_host_and_with_a_node_copy(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, engine: str
) -> None:
    file = Path(f"ds_configs/{engine}.json").read_text()
    hpz = json.loads(file)
    if engine == "zero3_hpz":
        hpz["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "engine.json").write_text(json.dumps(hpz))
    # The norm that clips is summed in another order on the host.
    options = {"method": "adalora", "max_steps": 12, "rank": 6, "max_grad_norm": 0}
    options |= LAWS["adalora"].on
    for folder, more in (("plain", {}), ("other", {"ds_config": tmp_path / "engine.json"})):
        ranks(2, TRAIN, flags=tiny.flags(tmp_path / folder, **options | more))
    plain, other = (read_records(tmp_path / n / "decisions.jsonl") for n in ("plain", "other"))
    assert plain == other
    for key in ("master", "live"):
        first, second = (saved(tmp_path / n, key, 12) for n in ("plain", "other"))
        assert all(torch.equal(first[n], second[n]) for n in first), key


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("roselora", {"roselora_keep": 0.9}),
        in_full("increlora", {"increlora_modules": 3}),
        in_full("adalora", {"adalora_final": 0.7}),
    ],
)
def test_a_schedule_in_its_middle_cannot_be_drawn_anew(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str, changed: dict[str, float]
) -> None:
    """Longer, its keep fraction would rise again; shorter, its end may lie behind it."""
    options = {"method": name, "max_steps": 20} | LAWS[name].on
    options |= {"rank": 6, "save_every": 6, "stop_after": 19}
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, **options))
    early = tmp_path / "checkpoints" / "step_00000006"
    more = options | {"stop_after": "null", "max_steps": 40}
    for said in ranks(2, REFUSAL, flags=tiny.flags(tmp_path / "b", **more, resume=early)):
        assert f"schedule of {name} that ends with step 20" in said and "--max_steps 20" in said
        assert "the last step 20 -> 40" in said
    kept = options | {"stop_after": "null"} | changed
    for said in ranks(2, REFUSAL, flags=tiny.flags(tmp_path / "b", **kept, resume=early)):
        ((option, value),) = changed.items()
        assert f"schedule of {name} that ends with step 20" in said
        assert f"Changed: {option} " in said and f"-> {value}." in said
    # Once its last decision is made, a run may go on for as long as it likes.
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, **more | {"max_steps": 24}, resume="auto"))
    live, later = saved(tmp_path, "live", 19), saved(tmp_path, "live", 24)
    assert all(torch.equal(live[n], later[n]) for n in live)


def test_another_rule_is_another_run(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    options = {"method": "increlora", "max_steps": 12, "stop_after": 6}
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, **options))
    changes = {"increlora_score": ("delta", "statistics"), "increlora_preset": ("released", "pre")}
    for name, (value, said) in changes.items():
        words = tiny.flags(tmp_path, **options, resume="auto", **{name: value})
        for message in ranks(2, REFUSAL, flags=words):
            assert "belongs to another run" in message and said in message


@pytest.mark.parametrize("name", ["roselora", "sora", "increlora", "adalora"])
def test_without_an_option_thirty_steps_prune_or_grow(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    ranks(1, TRAIN, flags=tiny.flags(tmp_path, method=name, max_steps=30, learning_rate=2e-4))
    rows = read_records(tmp_path / "decisions.jsonl")
    counts = [(sum(r["ranks"].values()), sum(r["live"].values())) for r in rows]
    assert len(rows) >= 5
    # A quarter or more of what there was, of components or of entries.
    assert any(abs(a - b) >= 0.25 * a for a, b in zip(counts[0], counts[-1], strict=True))


BAD = {
    "keep": (["roselora_keep=0"], ["roselora_keep must be in (0, 1], got 0"]),
    "keep above": (["roselora_keep=1.5"], ["got 1.5"]),
    "begin after end": (
        ["roselora_begin=0.5", "roselora_end=0.5", "rank=0"],
        ["begin < end", "0.5 and 0.5", "rank must be at least 1"],
    ),
    "lambda": (["sora_lambdas=-1,2"], ["sora_lambdas must be at least 0 and rising"]),
    "stages": (["sora_lambdas=0,1,2,3,4,5,6"], ["7 stages", "4 steps"]),
    "budget above": (["increlora_budget=100"], ["100 components is above 56", "Raise --rank"]),
    "budget below": (["increlora_budget=13"], ["13 components is below the start, 14 linears x 1"]),
    "too many at a time": (["increlora_modules=15"], ["15 linears", "there are 14"]),
    "too long": (
        ["increlora_every=2", "increlora_modules=1", "increlora_pieces=1"],
        ["of 4", "too late", "increlora_every"],
    ),
    "target above": (["adalora_target_rank=5"], ["asks for 70 components", "Raise --rank"]),
    "target below": (["adalora_target_rank=0.5"], ["adalora_target_rank must be at least 1"]),
    "another's": (["adalora_every=2", "method=lora"], ["belongs to --method adalora"]),
    "a support": (
        ["method=shira", "rank=22"],
        ["22 makes 2,112 entries train", "has 2,048. Take --rank 21"],
    ),
    "sides": (["melora_blocks=7"], ["64", "7"]),
    "shapes": (["lorta_heads=2"], ["all linears must have one shape", "--target_modules q_proj,"]),
    "restarts": (
        ["mora_restarts=4"],
        ["mora_restarts is 4, which makes 5 stages, but the run has 4 steps", "4 stages fit"],
    ),
    "links": (
        ["cola_links=9"],
        ["cola_links is 9, which makes 9 stages, but the run has 4 steps", "4 stages fit"],
    ),
    "calibration": (
        ["method=shira", "shira_support=snip", "shira_calibration_steps=4"],
        ["shira_calibration_steps is 4, but the run has 4 steps"],
    ),
    "8 bits": (["moment_bits=16", "method=lora"], ["moment_bits must be one of 32, 8"]),
}


@pytest.mark.parametrize(("given", "said"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_weights_or_data_are_read(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, given: list[str], said: list[str]
) -> None:
    options = dict(word.split("=") for word in given)
    method = options.pop("method", given[0].split("_")[0])
    words = tiny.flags(tmp_path, method=method, **options)
    (message,) = ranks(1, "tests.work.run:refusal_before_data", flags=words)
    for word in said:
        assert word in message


@pytest.mark.parametrize(
    "options",
    [
        {"method": "increlora", "increlora_start_rank": 4, "increlora_target_rank": 4.0},
        {"method": "adalora", "adalora_target_rank": 4.0},
    ],
    ids=["increlora", "adalora"],
)
def test_a_first_rank_that_is_the_last_works(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, options: dict[str, object]
) -> None:
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, max_steps=10, **options))
    assert all(mask.all() for mask in saved(tmp_path, "live", 10).values())


@pytest.mark.parametrize("method", ["pst", "losa"])
def test_a_sparse_model_is_made_of_weights_that_are_there_and_without_dropout(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, method: str
) -> None:
    cached = tiny.flags(tmp_path / "cache", max_steps=1, base_cache=tmp_path / "cache")
    ranks(1, TRAIN, flags=cached)
    (quantized,) = (p.parent for p in (tmp_path / "cache").rglob("config.json"))
    for path in tiny.model.glob("*token*"):
        shutil.copyfile(path, quantized / path.name)
    for options, said in (
        ({"model": quantized}, "is stored in 4 bits. Set --model to the unquantised model"),
        ({"dropout": 0.1}, "--dropout 0.1 would bring back at random the base weights"),
    ):
        flags = tiny.flags(tmp_path / "run", method=method, max_steps=20, **options)
        # Of a model in 4 bits the few bytes that say how are read when it is opened.
        (message,) = ranks(1, "tests.work.run:refusal", flags=flags)
        assert said in message and f"--method {method}" in message


def test_a_pair_is_no_beginning_of_other_tensors(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path / "run", method="mora", init_adapter=tmp_path)
    (message,) = ranks(1, "tests.work.run:refusal", flags=flags)
    assert "--method mora trains other ones: mora_m. Use a --method that" in message


def test_pruned_weights_are_zero_in_the_merged_model_and_not_onto_others(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path / "run", method="pst", max_steps=8, pst_every=2, precision="bf16")
    ranks(2, TRAIN, flags=flags)
    merged = [str(tmp_path / "run"), "--format", "merged", "--output"]
    export(load_request([*merged, str(tmp_path / "out")]))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    weights, run = load_file(file), Trained.open(tmp_path / "run")
    for site in run.sites:
        weight = weights[f"{site.name}.weight"]
        assert int((weight == 0).sum()) >= weight.numel() // 2
        kept = run.slices.entries("kept", f"{site.name}.pst_pruned", 0, -(-weight.numel() // 8))
        assert not weight[unpack(kept, tuple(weight.shape))].any()
    with pytest.raises(UserError, match="--onto original is not possible with --method pst"):
        export(load_request([*merged, str(tmp_path / "no"), "--onto", "original"]))


@pytest.mark.parametrize(
    ("began", "goes_on", "said"),
    [
        ("method=cola,cola_links=3", "method=cola,cola_links=1", "cola_links was 3, now 1"),
        ("method=mora,mora_restarts=1", "method=mora", "mora_restarts was 1, now 0"),
        ("method=mora", "method=mora,mora_type=1", "mora_type was 6, now 1"),
        (
            "method=shira,shira_support=magnitude",
            "method=shira",
            "shira_support was 'magnitude', now 'random'",
        ),
        (
            "method=prilora,prilora_sparsity=0",
            "method=prilora",
            "prilora_sparsity was 0.0, now 0.5",
        ),
    ],
)
def test_a_resume_does_not_lose_or_move_what_was_chosen(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, began: str, goes_on: str, said: str
) -> None:
    def flags(words: str, **options: object) -> list[str]:
        given = dict(word.split("=") for word in words.split(","))
        return tiny.flags(tmp_path, max_steps=9, **given, **options)

    ranks(1, TRAIN, flags=flags(began, stop_after=5))
    (message,) = ranks(1, REFUSAL, flags=flags(goes_on, resume="auto"))
    assert "belongs to another run" in message and said in message
