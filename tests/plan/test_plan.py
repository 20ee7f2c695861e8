"""The planner: what a rank holds, byte for byte; laws; the arithmetic of 70B; what it prints."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lora_dist.config.deepspeed_file import world_problems
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.methods.protocol.form import Form, Site, low_rank
from sparse_lora_dist.methods.protocol.method import (
    Decision,
    Method,
    MethodFactory,
    NoOptions,
    Scores,
)
from sparse_lora_dist.plan.advice import Limits, need_of, smallest_world
from sparse_lora_dist.plan.forecast import forecast
from sparse_lora_dist.plan.load_memory import base_shard_bytes, load_peak_bytes
from sparse_lora_dist.plan.memory import (
    loss_bytes,
    moment_bytes,
    rank_memory,
    saved_bytes,
    trained_entries,
)
from sparse_lora_dist.plan.output import Outcome, as_json, as_text
from sparse_lora_dist.plan.plan_options import PlanRequest, bytes_in, load_request
from sparse_lora_dist.plan.playback.gathers import Bounds, gathered
from sparse_lora_dist.plan.playback.parameters import PlannedParameter, shard_bytes
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes
from sparse_lora_dist.plan.shapes import shapes_of
from sparse_lora_dist.plan.speed import step_flop
from tests.conftest import Ranks as RealRanks
from tests.fixtures.tiny_models import save_llama
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import grid

ROOT = Path(__file__).parents[2]
LLAMA_70B = str(ROOT / "assets" / "plans" / "llama-3-70b")
LEAN = {"gradient_checkpointing": "true", "micro_batch_size": 1, "sequence_length": 2048}


def request(model: str = LLAMA_70B, **options: object) -> PlanRequest:
    flags = {"model": model, "ds_config": str(ROOT / "ds_configs" / "zero3.json")} | options
    return load_request([word for k, v in flags.items() for word in (f"--{k}", str(v))])


def shapes(model: str = LLAMA_70B, **options: object) -> Shapes:
    return shapes_of(request(model, **options).config)


def outcome(**options: object) -> Outcome:
    asked = request(**options)
    return Outcome(
        shapes=shapes_of(asked.config),
        engine=PlannedEngine.of(asked.engine),
        ranks=Ranks(
            world_size=asked.plan.world_size,
            nodes=asked.plan.nodes,
            on_gpu=asked.plan.gpu_bytes > 0,
        ),
        plan=asked.plan,
    )


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Llama-3-70B with 2 of its 80 layers: for what does not depend on their number."""
    folder = tmp_path_factory.mktemp("two_layers")
    content = json.loads((Path(LLAMA_70B) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 2}))
    return str(folder)


def test_a_node_may_have_fewer_ranks_than_another(two_layers: str) -> None:
    """As the command says that a run on 2 + 1 ranks prints. The fullest node is planned."""
    uneven = outcome(model=two_layers, world_size=3, nodes=2, gpu_memory="80GB")
    assert uneven.ranks.per_node == 2
    with pytest.raises(ConfigError, match="at least --nodes, got 1 ranks on 2 nodes"):
        request(two_layers, world_size=1, nodes=2)


@pytest.mark.parametrize(("steps", "of"), [(1, 1), (2, 2)])
def test_gradients_that_choose_entries_are_counted(two_layers: str, steps: int, of: int) -> None:
    """SHiRA: an fp32 number for each weight of the linears, sharded; --shira_calibration_steps 2
    collects every second linear."""
    chosen = {"method": "shira", "shira_support": "snip", "shira_calibration_steps": steps}
    lines = {
        line.key: line.bytes
        for line in outcome(model=two_layers, world_size=8, **chosen).memory.lines
    }
    h, kv, wide = 8192, 1024, 28672
    layer = [h * h, kv * h, kv * h, h * h, wide * h, wide * h, h * wide] * 2
    most = max(4 * sum(layer[first::of]) // 8 for first in range(of))
    assert lines["collected"] == {"pass": most + 4 * max(layer), "step": most}


def test_statistics_of_inputs_are_counted(two_layers: str) -> None:
    """PRILoRA squares an fp32 copy of a linear's input in backward: 4,096 tokens of 28,672."""
    options = {"model": two_layers, "micro_batch_size": 8, "gradient_checkpointing": "true"}
    plain, with_squares = (
        outcome(method=method, **options).shapes.step for method in ("lora", "prilora")
    )
    copies = 2 * 4 * 8 * 512 * 28672
    assert 0.2 * copies < with_squares.backward - plain.backward < copies
    assert with_squares.kept == plain.kept


@pytest.mark.parametrize("method", ["prilora", "losa"])
def test_mean_squares_are_counted_in_memory_and_checkpoints(two_layers: str, method: str) -> None:
    """8 bytes for each of the inputs: seven linears a layer, of which one has 28,672."""
    found = outcome(model=two_layers, method=method, **LEAN)
    inputs = 2 * (6 * 8192 + 28672)
    of_host = found.memory.lines
    assert [x.bytes["step"] for x in of_host if x.key == "squares"] == [8 * inputs]
    shapes = found.shapes
    without = replace(shapes.method, rewriting=replace(shapes.method.rewriting, squares_decay=None))
    other = shapes.with_config(shapes.config)
    other.__dict__["method"] = without
    one, eight = (saved_bytes(shapes, Ranks(world_size=n)) for n in (1, 8))
    assert one - saved_bytes(other, Ranks(world_size=1)) == 8 * inputs
    assert eight - saved_bytes(other, Ranks(world_size=8)) == inputs


# Against real shards


@grid(
    "options size",
    [
        {},
        {"precision": "bf16", "double_quant": "false"},
        {"method": "increlora", "rank": 8, "max_steps": 12, "precision": "bf16"},
        {"moment_bits": 8, "modules_to_save": "embed_tokens"},
        {"method": "adalora", "max_steps": 40, "stop_after": 1, "modules_to_save": "lm_head"},
        {"method": "increlora", "rank": 8, "max_steps": 12, "modules_to_save": "lm_head"},
        {"method": "pst", "max_steps": 6, "precision": "bf16"},
        {"method": "shira", "shira_support": "magnitude"},
    ],
    [3, 1],
    ids=lambda value: (
        str(value) if isinstance(value, int) else f"{value.get('method', 'lora')}{len(value)}"
    ),
)
def test_lines_of_shares_are_those_of_a_run(
    ranks: RealRanks, tiny: TinyRun, tmp_path: Path, size: int, options: dict[str, Any]
) -> None:
    flags = tiny.flags(tmp_path / "run", **options)
    found = ranks(size, "tests.work.plan:real_and_planned", flags=flags)
    real, planned = found[0]
    packed = real.pop("packed_weights")
    assert packed + real["persistent"] > 0 and real["moments"] > 0
    moments, planned_moments = real.pop("moments"), planned["moments"]
    if options.get("method") == "increlora":
        assert planned_moments == pytest.approx(moments, rel=0.1), "by schedule, not by data"
    else:
        # 8-bit scales are rounded up in each block, and the padding between tensors has none.
        assert planned_moments == pytest.approx(moments, rel=0.02)
    for key, size_of_it in real.items():
        assert planned.get(key, 0) == size_of_it, key


@pytest.fixture(scope="module")
def all_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine file that shards even the smallest parameters."""
    content = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = tmp_path_factory.mktemp("engine") / "all_sharded.json"
    file.write_text(json.dumps(content))
    return file


def test_packed_weights_are_exact_too(
    ranks: RealRanks, tiny: TinyRun, tmp_path: Path, all_sharded: Path
) -> None:
    for size in (1, 3):
        flags = tiny.flags(tmp_path / str(size), precision="bf16", ds_config=all_sharded)
        for real, planned in ranks(size, "tests.work.plan:real_and_planned", flags=flags):
            assert real["packed_weights"] == planned["packed_weights"]


@pytest.mark.usefixtures("full")
def test_a_copy_that_is_written_beside_training_is_planned(
    ranks: RealRanks, tiny: TinyRun, tmp_path: Path
) -> None:
    usual = {"max_steps": 3, "save_every": 2, "method": "sora"}
    found = ranks(
        2, "tests.work.plan:copied_and_planned", flags=tiny.flags(tmp_path / "beside", **usual)
    )
    copied = max(one for one, _ in found)
    assert found[0][1] == pytest.approx(copied, rel=0.02)
    mora: dict[str, object] = {"max_steps": 3, "method": "mora", "mora_restarts": 1}
    found = ranks(
        2, "tests.work.plan:copied_and_planned", flags=tiny.flags(tmp_path / "kept", **mora)
    )
    assert found[0][1] == pytest.approx(max(one for one, _ in found), rel=0.02), (
        "with what it keeps"
    )
    cases: list[tuple[dict[str, object], bool]] = [
        ({"async_save": "false", "save_every": 2}, False),
        ({"save_every": 4}, False),
        ({"save_every": 2}, True),
        ({"method": "sora", "sora_lambdas": "1,2", "save_every": 0}, True),  # after each stage
    ]
    for options, trains in cases:
        memory = shapes(**{"max_steps": 4} | options)
        lines = rank_memory(memory, PlannedEngine.of({}), Ranks(world_size=8)).lines
        (line,) = [line for line in lines if line.key == "saved_copy"]
        assert line.bytes["save"] > 0 and ("pass" in line.bytes) == trains


@pytest.fixture(scope="module")
def saved_in_4_bits(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as bitsandbytes quantised it: scales in fp32, some linears left out."""

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("saved") / "model"
    shutil.copytree(tiny.model, folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "up_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return folder


def test_a_checkpoint_in_4_bits_is_planned_as_it_was_saved(
    ranks: RealRanks, tiny: TinyRun, tmp_path: Path, saved_in_4_bits: Path, all_sharded: Path
) -> None:
    options = {"model": saved_in_4_bits, "precision": "bf16", "ds_config": all_sharded}
    flags = tiny.flags(tmp_path / "run", max_steps=1, **options)
    real, planned = ranks(3, "tests.work.plan:real_and_planned", flags=flags)[0]
    for key in ("packed_weights", "scales", "unquantised_linears", "embeddings"):
        assert planned[key] == real[key] > 0, key
    from safetensors.torch import load_file

    tensors = load_file(saved_in_4_bits / "model.safetensors")
    known = {k: t for k, t in tensors.items() if "quant_" not in k}
    found = outcome(model=str(saved_in_4_bits), rank=4)
    assert found.speed.file_bytes == sum(t.nbytes for t in known.values())
    assert "4 bits and scales in the base files" in as_text(found)


# 70B


@pytest.fixture(scope="module")
def llama_70b() -> Shapes:
    return shapes(**LEAN)


def test_70b_is_the_arithmetic_of_the_design(llama_70b: Shapes) -> None:
    sizes = {
        kind: shard_bytes([p for p in llama_70b.parameters if p.kind == kind], 1, 2) / 1e9
        for kind in ("packed", "scales", "embeddings", "plain")
    }
    assert sizes["packed"] == pytest.approx(34.2, abs=0.05)
    assert sizes["scales"] == pytest.approx(1.1, abs=0.05)
    assert sizes["embeddings"] + sizes["plain"] == pytest.approx(4.2, abs=0.05)
    assert trained_entries(llama_70b, Ranks(world_size=1)) / 1e6 == pytest.approx(207, abs=0.5)
    plain = shapes(double_quant="false", rank=64, **LEAN)
    scales = shard_bytes([p for p in plain.parameters if p.kind == "scales"], 1, 2)
    assert scales / 1e9 == pytest.approx(4.3, abs=0.05)
    assert trained_entries(plain, Ranks(world_size=1)) / 1e6 == pytest.approx(828, abs=1)


def test_70b_gathers_the_base_once_a_pass(llama_70b: Shapes) -> None:
    base = 35.3 + 4.2
    found = gathered(
        llama_70b.parameters, "model.layers", Bounds(prefetch=0, reuse=0), checkpointing=False
    )
    assert found.received * 2 / 1e9 == pytest.approx(2 * base, abs=0.6)
    again = gathered(
        llama_70b.parameters, "model.layers", Bounds(prefetch=0, reuse=0), checkpointing=True
    )
    assert again == found, "a layer that runs again is still gathered for its backward"
    by_module = Bounds(prefetch=0, reuse=0, by_layer=False)
    usual, again = (
        gathered(llama_70b.parameters, "model.layers", by_module, checkpointing=c)
        for c in (False, True)
    )
    assert usual.received == found.received
    assert (again.received - usual.received) * 2 / 1e9 == pytest.approx(35.3, abs=0.6)


def test_70b_in_4_bit_on_8_and_on_2_ranks(llama_70b: Shapes) -> None:
    engine = PlannedEngine.of(request().engine)
    shares = {
        count: sum(
            line.bytes["load"]
            for line in rank_memory(llama_70b, engine, Ranks(world_size=count)).lines
            if line.label.startswith("base:")
        )
        for count in (2, 8)
    }
    assert shares[8] / 1e9 == pytest.approx(39.5 / 8, abs=0.02)
    assert shares[2] / 1e9 == pytest.approx(20, abs=0.5)


def test_70b_peaks_under_8_gb_a_rank_of_8_while_loading(llama_70b: Shapes) -> None:
    for count in (8, 16, 64):
        shard, peak = base_shard_bytes(llama_70b, count), load_peak_bytes(llama_70b, count)
        assert shard == pytest.approx(39.5e9 / count, rel=0.01)
        adapter = trained_entries(llama_70b, Ranks(world_size=count)) * 2
        # The head comes last, as large in the file as its share.
        assert peak - shard - adapter == pytest.approx(2.1e9 / count, rel=0.25)
    assert load_peak_bytes(llama_70b, 8) < 8e9


# Laws


def small(tmp_path: Path, layers: int = 6, **options: object) -> Shapes:
    folder = tmp_path / "llama"
    if not folder.exists():
        save_llama(folder, num_hidden_layers=layers, hidden_size=96, intermediate_size=160)
    (folder / "model.safetensors").unlink(missing_ok=True)
    return shapes(str(folder), rank=4, **options)


ENGINES = [
    PlannedEngine(bounds=Bounds()),
    PlannedEngine(bounds=Bounds(persistent=0, live=10_000, reuse=0)),
]


@pytest.mark.usefixtures("model_on_disk")
@pytest.mark.parametrize("engine", ENGINES, ids=["all live", "little live"])
def test_more_ranks_never_need_more(tmp_path: Path, engine: PlannedEngine) -> None:
    of = small(tmp_path)
    needs = [need_of(of, engine, Ranks(world_size=n)).gpu for n in range(2, 20)]
    assert needs == sorted(needs, reverse=True)


@pytest.mark.usefixtures("model_on_disk")
@pytest.mark.parametrize("engine", ENGINES, ids=["all live", "little live"])
def test_what_saves_never_needs_more(tmp_path: Path, engine: PlannedEngine) -> None:
    ranks = Ranks(world_size=4)

    def need(engine: PlannedEngine = engine, **options: object) -> int:
        return need_of(small(tmp_path, **options), engine, ranks).gpu

    usual = need()
    for options in (
        {"gradient_checkpointing": "true"},
        {"sequence_length": 256},
        {"micro_batch_size": 2},
        {"moment_bits": 8},
    ):
        assert need(**options) <= usual, options
    assert need(replace(engine, parameters="cpu", optimizer="cpu")) <= usual
    single = replace(engine.bounds, one_by_one=True)
    assert need(replace(engine, bounds=single)) <= usual <= need(replace(engine, hpz=2))


def test_the_smallest_number_of_ranks_fits_and_one_less_does_not(llama_70b: Shapes) -> None:
    engine, ranks = PlannedEngine.of(request().engine), Ranks(world_size=8)
    limits = Limits(gpu=24 * 10**9, host=None)
    least = smallest_world(llama_70b, engine, ranks, limits)
    assert least is not None

    def need(count: int) -> int:
        return need_of(llama_70b, engine, Ranks(world_size=count)).gpu

    assert least <= 8 and need(least) <= limits.gpu < need(least - 1)
    assert smallest_world(llama_70b, engine, ranks, Limits(gpu=10**9, host=None)) is None


@pytest.mark.usefixtures("model_on_disk")
@pytest.mark.parametrize(
    ("nodes", "hpz", "batch"), [(1, 1, 0), (4, 1, 0), (2, 4, 0), (2, 3, 0), (2, 1, 4)]
)
def test_the_smallest_number_of_ranks_is_one_that_a_run_takes(
    tmp_path: Path, nodes: int, hpz: int, batch: int
) -> None:
    of, ranks = small(tmp_path, 2, micro_batch_size=1), Ranks(world_size=4 * nodes, nodes=nodes)
    ranks = ranks if not batch else replace(ranks, world_size=4, nodes=1)
    content: dict[str, Any] = {"zero_optimization": {"zero_hpz_partition_size": hpz}}
    content |= {"train_batch_size": batch} if batch else {}
    engine = PlannedEngine.of(content)
    allowed = [*range(1, 5), *range(8, 65, 4)]
    allowed = [n for n in allowed if not world_problems(content, of.config, n, "")]
    needs = {
        n: need_of(of, engine, replace(ranks, world_size=n, nodes=-(-n // 4))) for n in allowed
    }
    most = max(n.gpu for n in needs.values())
    for host in sorted({None, *(n.host for n in needs.values())}, key=str):
        for gpu in sorted({most, *(n.gpu for n in needs.values())}):
            limits = Limits(gpu=gpu, host=host)
            first = next((n for n in allowed if needs[n].fits(limits)), None)
            assert smallest_world(of, engine, ranks, limits) == first, limits


@pytest.mark.parametrize(
    ("name", "first", "peak", "last"),
    [
        ("lora", 1.0, 1.0, 1.0),
        ("roselora", 1.0, 1.0, 0.05),
        ("sora", 1.0, 1.0, 1.0),
        ("increlora", 0.125, 0.5, 0.5),
        ("adalora", 1.0, 1.0, 2 / 3),
    ],
)
def test_live_entries_follow_the_methods_own_schedule(
    llama_70b: Shapes, name: str, first: float, peak: float, last: float
) -> None:
    factory = METHODS[name]
    found = forecast(factory, factory.options(), llama_70b.run_context)
    alone = found.on(1)
    assert (alone.first, alone.peak, alone.last) == pytest.approx((first, peak, last), abs=0.01)
    assert found.birth_bytes == (2 if name == "increlora" else 0)


def test_open_components_lie_on_the_first_rank(llama_70b: Shapes) -> None:
    factory = METHODS["increlora"]
    found = forecast(factory, factory.options(), llama_70b.run_context)
    # Most of its rows of A, half of its columns of B.
    assert found.on(1).peak == pytest.approx(0.5, abs=0.01)
    assert 0.55 < found.on(4).peak <= 0.75


def test_a_linear_counts_by_its_own_rank(llama_70b: Shapes) -> None:
    def form(site: Site) -> Form:
        return low_rank(replace(site, rank=1 + int(site.name)))

    def decide(step: int, scores: Scores) -> Decision:
        dead = [n for n in scores.shapes if n.startswith("3.")]
        return Decision(live={n: torch.zeros(prod(scores.shapes[n])).bool() for n in dead})

    method = Method(name="own", form=form, decides_at=lambda step: step == 0, decide=decide)
    factory = MethodFactory(options=NoOptions, build=lambda options, plan: method, summary="")
    live = forecast(factory, NoOptions(), llama_70b.run_context).on(1)
    # Ranks 1 to 8, without the one of rank 4.
    assert live.first == live.last == pytest.approx(32 / 36)


def test_moments_cost_8_bytes_a_live_entry_and_a_bit_each() -> None:
    assert moment_bytes(1000, 1000, 32, 0) == 8 * 1000 + 125
    assert moment_bytes(500, 1000, 8, 2) == 500 * (2 + 8 / 256 + 2) + 125


def test_a_prefetched_head_stands_beside_its_buffer() -> None:
    layer = PlannedParameter(name="l.weight", module="l", kind="packed", numel=10)
    norm = PlannedParameter(name="n.weight", module="n", kind="rest", numel=2)
    head = PlannedParameter(name="h.weight", module="h", kind="plain", numel=100)
    bounds = Bounds(prefetch=11, live=200, reuse=0, persistent=0)
    found = gathered([layer, norm, head], "", bounds, checkpointing=False)
    assert found.peak == 10 + 2 * 102 or found.peak == 2 * 102
    single = replace(bounds, one_by_one=True)
    assert gathered([layer, norm, head], "", single, checkpointing=False).peak <= 112


@pytest.mark.usefixtures("model_on_disk")
def test_a_tied_head_is_gathered_and_computed_like_one_of_its_own(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "num_hidden_layers": 6, "intermediate_size": 160}
    found = {}
    for tied in (False, True):
        save_llama(tmp_path / str(tied), tied=tied, **sizes)
        found[tied] = shapes(str(tmp_path / str(tied)), rank=4)
    bounds = Bounds(prefetch=0, persistent=0, reuse=0)
    moved = {tied: of.gathered(bounds) for tied, of in found.items()}
    assert moved[True] == moved[False]
    assert step_flop(found[True]) == step_flop(found[False])
    kept = Bounds(persistent=0)
    vocabulary = 101 * 96
    less = found[False].gathered(kept).received - found[True].gathered(kept).received
    assert less == vocabulary, "still whole from its first use"


@pytest.mark.parametrize("whole_logits", [False, True])
def test_a_trained_heads_own_gradients_are_counted(llama_70b: Shapes, whole_logits: bool) -> None:
    of = llama_70b.with_config(llama_70b.config, whole_logits=whole_logits)
    head = replace(of, trained=("lm_head",), _gathered={})
    weight = 128256 * 8192
    more = loss_bytes(head) - loss_bytes(of)
    assert more == weight * (2 if whole_logits else 4 + 2 + 2)
    rank = Ranks(world_size=8)
    work = [
        sum(line.bytes["pass"] for line in found.lines if line.key == "work")
        for found in (rank_memory(s, PlannedEngine(bounds=Bounds()), rank) for s in (of, head))
    ]
    assert work[1] - work[0] >= weight * 2


def test_one_gpu_copies_what_is_offloaded_without_a_buffer(llama_70b: Shapes) -> None:
    away = PlannedEngine.of(
        request(ds_config=str(ROOT / "ds_configs" / "zero3_offload.json")).engine
    )
    away = replace(away, bounds=replace(away.bounds, prefetch=2 * 10**9, live=3 * 10**9))
    single = replace(away, bounds=replace(away.bounds, one_by_one=True))

    def whole(engine: PlannedEngine, count: int) -> int:
        lines = rank_memory(llama_70b, engine, Ranks(world_size=count)).lines
        return sum(x.bytes["pass"] for x in lines if x.key == "gathered")

    assert 0 < whole(away, 1) == whole(single, 1) == whole(single, 2) < whole(away, 2)


# Other architectures, and none


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_architectures_are_planned_from_config_alone(
    tmp_path: Path, name: str, checkpointing: str
) -> None:
    config = {
        "model_type": name,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if name in ("gpt_neox", "phi") else 2,
        "vocab_size": 300,
        **ARCHITECTURES[name],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = shapes(str(tmp_path), gradient_checkpointing=checkpointing, rank=4, sequence_length=64)
    step = found.step
    assert 0 < step.kept < step.backward
    experts = [p for p in found.parameters if p.module.endswith("experts")]
    assert bool(experts) == ("num_local_experts" in config or "num_experts" in config)
    assert {p.kind for p in experts} <= {"packed", "scales"}


@pytest.mark.usefixtures("model_on_disk")
def test_what_autograd_keeps_is_what_the_hooks_of_a_real_run_see(tmp_path: Path) -> None:
    """torch's saved_tensors_hooks on the real model, on the CPU, with real numbers."""

    from transformers import AutoConfig, AutoModelForCausalLM

    from sparse_lora_dist.methods.protocol.method import Method
    from sparse_lora_dist.plan.playback import meta_step as shape_step

    of = small(tmp_path, precision="fp32")
    config = AutoConfig.from_pretrained(of.config.model.model)
    rows, tokens = 2, 48
    planned = shape_step.step_memory(
        of.model,
        of.sites,
        of.method,
        rows=rows,
        tokens=tokens,
        trained=(),
        checkpointing=False,
        dropout=0.0,
        packed=True,
    )
    real = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    with torch.device("cpu"):
        _inject_for_real(real, of, Method(name="lora"))
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)  # else a freed address would be counted once for two
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids = torch.randint(0, 90, (rows, tokens))
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        real.base_model(input_ids=ids, attention_mask=mask)
    saved = sum(n for pointer, n in storages.items() if pointer not in weights)
    assert planned.kept == pytest.approx(saved, rel=0.05)


PACKED = {"micro_batch_size": 1, "rank": 2}
ATTENDING: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
    "pad_token_id": 0,
}
"""A model whose attention takes nearly all memory at thousands of tokens."""
BOTH_MASKS = {
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}


@pytest.mark.usefixtures("model_on_disk")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("gemma3_text", BOTH_MASKS)])
def test_attention_of_packed_rows_is_planned_to_the_byte(
    tmp_path: Path, family: str, more: dict[str, Any], attention: str
) -> None:
    """At 4,096 tokens, against what torch's hooks see of a forward on the CPU in bf16."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    from sparse_lora_dist.methods.protocol.method import Method

    CONFIG_MAPPING[family](**ATTENDING, **more).save_pretrained(tmp_path)
    tokens = 4096
    of = shapes(str(tmp_path), sequence_length=tokens, attn_implementation=attention, **PACKED)
    real = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), dtype=of.dtype, attn_implementation=attention
    ).train()
    with torch.device("cpu"):
        _inject_for_real(real, of, Method(name="lora"))
    kept: dict[int, torch.Tensor] = {}  # tensors: else a freed address would count once for two

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    ids = torch.randint(0, 90, (1, tokens))
    positions = torch.cat([torch.arange(n) for n in (1000, 3000, tokens - 4000)])[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = real.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    saved = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)
    assert of.step.kept == saved + out.untyped_storage().nbytes()


def test_attention_by_lengths_has_no_mask_in_the_plan(tmp_path: Path) -> None:
    """At 32,768 tokens a mask of sdpa takes 2.1 GB a layer, in bf16. By lengths a layer keeps
    neither it nor copies of keys and values for each query head; its output and the logarithm of
    each softmax are kept either way."""
    from transformers import LlamaConfig

    heads, key_heads, size, layers = 4, 2, 16, ATTENDING["num_hidden_layers"]
    sizes = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    LlamaConfig(**ATTENDING | sizes).save_pretrained(tmp_path)
    tokens = 2**15
    options = {"sequence_length": tokens, **PACKED}
    mask, ours = (
        shapes_of(request(str(tmp_path), **options).config, on_gpu=on_gpu).step
        for on_gpu in (False, True)
    )
    assert ours.backward < tokens**2, "not one byte for each pair of tokens"
    copies = 2 * (heads - key_heads) * size * tokens * 2  # of keys and values, in bf16
    random_state = 2 * 8  # of the kernel, in uint64
    assert mask.kept - ours.kept == layers * (2 * tokens**2 + copies - random_state)


def test_attention_by_lengths_is_planned_for_gpus_alone(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(**ATTENDING).save_pretrained(tmp_path)
    asked = request(str(tmp_path), attn_implementation="varlen", **PACKED).config
    assert shapes_of(asked, on_gpu=True).model.config._attn_implementation == "varlen"
    with pytest.raises(UserError, match="its kernel needs a GPU"):
        shapes_of(asked)
    half = (step_flop(shapes_of(asked, on_gpu=True)), step_flop(shapes(str(tmp_path), **PACKED)))
    length, width = asked.data.sequence_length, 2 * 16
    assert half[1] - half[0] == pytest.approx(3.5 * 2 * length**2 * width * 2)


def _inject_for_real(model: Any, of: Shapes, method: Any) -> None:
    from unittest.mock import patch

    from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
    from sparse_lora_dist.plan.playback import meta_step as shape_step

    with (
        patch.object(shape_step, "META", torch.device("cpu")),
        patch.object(shape_step, "_MetaLinear", FrozenLinear),
    ):
        seeds = shape_step._MetaSeeds(seed=0, sequence_length=64)
        shape_step._inject(model, of.sites, method, 0.0, seeds, ())


def test_an_unknown_architecture_says_which_fields_it_needs(tmp_path: Path) -> None:
    config = {"model_type": "wonder", "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        shapes(str(tmp_path), rank=4)
    message = str(caught.value)
    for word in ("wonder", "intermediate_size", "num_attention_heads", "vocab_size"):
        assert word in message
    assert "hidden_size, num_hidden_layers" in message, "those it got"


def test_an_unknown_architecture_with_all_fields_is_planned_as_a_llama(tmp_path: Path) -> None:
    config = {
        "model_type": "wonder",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = shapes(str(tmp_path), rank=4)
    assert "wonder" in found.notes[0] and "Llama" in found.notes[0]
    assert len(found.sites) == 14


def test_a_model_that_needs_more_than_shapes_keeps_a_llamas_activations(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", **sizes}))
    found = shapes(str(tmp_path), rank=4)
    assert found.step.kept > 0 and found.notes[0].startswith("--packing is false")
    assert "bloom cannot run on the meta device" in found.notes[1]
    assert found.with_config(found.config).step.kept > 0 and len(found.notes) == 2


# What is said


def test_what_does_not_fit_says_what_to_change() -> None:
    found = outcome(world_size=2, gpu_memory="24GB", sequence_length=4096, micro_batch_size=2)
    text = as_text(found)
    assert "DOES NOT FIT" in text
    for change in (
        "--gradient_checkpointing true",
        "--ds_config zero3_offload",
        "--micro_batch_size 1",
    ):
        assert change in text
    best = min(change.need.gpu for change in found.changes)
    assert best < found.need.gpu / 2
    assert f"{best / 1e9:.2f}" in text


def test_what_fits_has_nothing_to_change() -> None:
    text = as_text(outcome(world_size=64, nodes=8, gpu_memory="80GB", **LEAN))
    assert "verdict   fits" in text and "to change" not in text
    assert "come into a node from other nodes" in text


KEYS = {
    "model", "method", "world_size", "nodes", "lines", "totals", "need", "limits", "fits",
    "smallest_world_size", "changes", "speed", "assumed", "notes",
}  # fmt: skip
SPEED_KEYS = {
    "gathered_bytes", "gathered_adapter_bytes", "reduced_bytes", "across_nodes_bytes", "read_bytes",
    "flop", "compute_s", "network_s", "read_s", "tokens", "file_bytes", "load_s",
    "checkpoint_bytes", "step_s_overlapped", "step_s_in_turn",
}  # fmt: skip


def test_json_keys_are_frozen(two_layers: str) -> None:
    found = json.loads(json.dumps(as_json(outcome(model=two_layers, **LEAN))))
    assert set(found) == KEYS
    assert set(found["speed"]) == SPEED_KEYS
    assert set(found["lines"][0]) == {"key", "label", "place", "bytes"}
    assert set(found["changes"][0]) == {"what", "need", "fits"}
    for place, phases in found["totals"].items():
        for phase, total in phases.items():
            lines = [r["bytes"].get(phase, 0) for r in found["lines"] if r["place"] == place]
            assert total == sum(lines)


def host_bytes(of: Shapes, engine: PlannedEngine, key: str, *, on_gpu: bool = True) -> int:
    lines = rank_memory(of, engine, Ranks(world_size=8, on_gpu=on_gpu)).lines
    return sum(x.bytes["pass"] for x in lines if x.key == key and x.place == "host")


def test_the_advice_to_offload_is_what_the_file_does(two_layers: str) -> None:
    run = {"model": two_layers} | LEAN
    files = ROOT / "ds_configs"
    offload = outcome(ds_config=str(files / "zero3_offload.json"), **run).need
    for name in ("zero3.json", "zero3_hpz.json", "zero3_nvme.json", "whole.json"):
        advised = outcome(ds_config=str(files / name), **run).changes
        assert [c.need for c in advised if c.what.endswith("zero3_offload")] == [offload]


def test_a_base_that_does_not_fit_whole_is_advised_to_be_sharded(two_layers: str) -> None:
    run = {"model": two_layers} | LEAN
    sharded, whole = (
        outcome(ds_config=str(ROOT / "ds_configs" / f"{name}.json"), **run)
        for name in ("zero3", "whole")
    )
    assert [c.need for c in whole.changes if c.what == "--ds_config zero3"] == [sharded.need]
    assert sharded.need.gpu < whole.need.gpu
    assert not [c for c in sharded.changes if c.what == "--ds_config zero3"]


def test_the_second_copy_lies_where_parameters_do(llama_70b: Shapes) -> None:
    away = PlannedEngine(bounds=Bounds(), hpz=8, parameters="cpu")
    assert host_bytes(llama_70b, away, "hpz_copy") > 4e9
    assert host_bytes(llama_70b, replace(away, parameters="none"), "hpz_copy") == 0


def test_pinned_shares_are_powers_of_two_on_a_gpu_machine(llama_70b: Shapes) -> None:
    free = PlannedEngine(bounds=Bounds(), parameters="cpu")
    pinned = replace(free, pinned=True)
    head = 128256 * 8192 * 2 // 8
    assert host_bytes(llama_70b, free, "embeddings") == head
    assert host_bytes(llama_70b, pinned, "embeddings") == 2**28 > head
    cpu = [host_bytes(llama_70b, e, "embeddings", on_gpu=False) for e in (free, pinned)]
    assert cpu == [head, head]


def test_small_shares_stay_in_memory_beside_a_disk(llama_70b: Shapes) -> None:
    content = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    disk = PlannedEngine.of(content)
    # Keys and values: 1,024 x 8,192 weights of half a byte in each of 80 layers.
    assert host_bytes(llama_70b, disk, "packed_weights") == 160 * 2**19
    small = [p for p in llama_70b.parameters if p.kind == "scales" and p.share(8) * 2 < 2**20]
    assert small and host_bytes(llama_70b, disk, "scales") == sum(
        2 ** (p.share(8) * 2 - 1).bit_length() for p in small
    )
    content["aio"]["block_size"] = 2**30
    assert host_bytes(llama_70b, PlannedEngine.of(content), "packed_weights") > 4e9


def test_what_adapters_keep_stays_in_memory_beside_a_disk() -> None:
    disk = PlannedEngine.of(json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text()))
    found = shapes(method="pst", **LEAN)
    kept = [p for p in found.parameters if p.kind == "kept"]
    # A bit a weight of the base.
    weights = sum(s.in_features * s.out_features for s in found.run_context.sites)
    assert sum(p.numel for p in kept) * 2 == weights / 8
    assert host_bytes(found, disk, "kept", on_gpu=False) == weights / 8 / 8


def test_hpz_keeps_the_base_within_a_node() -> None:
    flat, own = (
        outcome(world_size=16, nodes=2, ds_config=str(ROOT / "ds_configs" / name), **LEAN).speed
        for name in ("zero3.json", "zero3_hpz.json")
    )
    # From the 7 others of a node, or from 15.
    assert own.gathered_bytes / flat.gathered_bytes == pytest.approx((7 / 8) / (15 / 16))
    assert flat.across_nodes_bytes > 30 * own.across_nodes_bytes


def test_a_copy_over_two_nodes_is_gathered_across_them() -> None:
    own = outcome(
        world_size=16, nodes=4, ds_config=str(ROOT / "ds_configs" / "zero3_hpz.json"), **LEAN
    ).speed
    # Half of what the 8 ranks of a copy hold; 7 / 8 of it comes to each.
    assert own.across_nodes_bytes > 0.5 / (7 / 8) * own.gathered_bytes


def test_shares_on_disk_are_read_for_every_use() -> None:
    memory, disk = (
        outcome(world_size=8, nodes=2, ds_config=str(ROOT / "ds_configs" / name), **LEAN)
        for name in ("zero3.json", "zero3_nvme.json")
    )
    assert memory.speed.read_bytes == memory.speed.read_s == 0
    read = disk.speed.read_bytes
    assert read == pytest.approx(disk.speed.gathered_bytes / 7)
    assert disk.speed.read_s == pytest.approx(4 * read / 1e9), "four ranks share 1 GB/s"
    # A disk's shares are gathered a module at a time, others a layer.
    in_turn = memory.speed.step_s[1] + disk.speed.read_s
    assert disk.speed.step_s[1] == pytest.approx(in_turn, rel=1e-3)
    assert disk.speed.step_s[0] >= disk.speed.read_s
    assert "GB of the base from disk" in as_text(disk)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("80", 80e9), ("22.5 GiB", 22.5 * 2**30), ("8e9B", 8e9), ("1tb", 1e12)],
)
def test_sizes(text: str, size: float) -> None:
    assert bytes_in(text) == size


def test_wrong_options_are_all_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        request(gpu_memory="many", world_sise=4, nodes=3, rank="no number")
    said = "\n".join(caught.value.problems)
    for words in ("gpu_memory must be a size", "did you mean --world_size", "rank must be"):
        assert words in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"tflops": 1e-5}, "tflops must be at least 0.001"),
        ({"gpu_memory": "0.5B"}, "gpu_memory must be a size"),
        ({"gpu_memory": "\uff12\uff14GB"}, "gpu_memory must be a size"),
        ({"plot": "no_such_folder/a.png"}, "is in no folder"),
        ({"world_size": 1_000_000, "nodes": 100}, "at most 1024 on a node, got 1000000 on 100"),
        ({"gpu_memory": "1e999GB"}, "gpu_memory must be a size"),
        ({"host_memory": "1e308TB"}, "host_memory must be a size"),
    ],
)
def test_numbers_out_of_range_are_problems(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        request(**options)
    (problem,) = caught.value.problems
    assert words in problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "roselora", "max_steps": 1}, "raise --max_steps"),
        (
            {"method": "sora", "sora_lambdas": "0.5,1,2", "warmup_steps": 500},
            "assumes 1000 steps because --max_steps is not given",
        ),
    ],
)
def test_a_schedule_without_room_is_a_user_error(options: dict[str, object], words: str) -> None:
    found = shapes(**options)
    with pytest.raises(UserError, match=words) as caught:
        assert found.parameters
    assert str(caught.value).startswith(f"--method {options['method']}: ")


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "must be a JSON object"),
        (
            {"model_type": "wonder", **SIZES, "num_attention_heads": 0},
            "invalid are num_att",
        ),
        (
            {"model_type": "wonder", **SIZES, "num_attention_heads": 3},
            "(?s)not make a Llama.*multiple",
        ),
        ({"model_type": "wonder", **SIZES, "head_dim": "x"}, "(?s)not make a Llama.*head_dim"),
        ({"model_type": ["llama"]}, "does not know the architecture"),
        ({"model_type": "llama", **SIZES, "num_attention_heads": 0}, "not describe a valid model"),
        ({"model_type": "llama", **SIZES, "hidden_size": -64}, "not describe a valid model"),
    ],
)
def test_sizes_of_no_model_are_one_user_error(tmp_path: Path, content: object, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        shapes(str(tmp_path), rank=4)


def test_training_says_so_too(ranks: RealRanks, tiny: TinyRun, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    flags = tiny.flags(tmp_path / "run", model=model)
    for message in ranks(2, "tests.work.run:refusal", flags=flags):
        assert "not describe a valid model" in message


def test_ranks_that_hpz_does_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 12 ranks"):
        request(ds_config=str(ROOT / "ds_configs" / "zero3_hpz.json"), world_size=12)


def test_a_runs_own_options_are_a_plan(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rank: 8\nmethod: roselora\noutput_dir: nowhere\n")
    found = request(config=tmp_path / "run.yaml", data="not/here.jsonl")
    assert found.config.adapter.rank == 8


@pytest.mark.usefixtures("processes")
def test_the_program_prints_json_and_draws(tmp_path: Path, two_layers: str) -> None:
    picture = tmp_path / "plan.png"
    words = ["launcher/plan.py", "--model", two_layers, "--json", "--plot", str(picture)]
    words += ["--ds_config", "ds_configs/zero3_hpz.json"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(json.loads(done.stdout)) == KEYS
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_a_run_says_once_whether_it_fits(ranks: RealRanks, tiny: TinyRun, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path / "run", max_steps=1)
    roomy = ranks(2, "tests.work.plan:run_with_room", flags=flags, room=10**10)
    assert [text.count("memory    about") for text in roomy] == [1, 0]
    assert "does not fit" not in roomy[0] and "of 10.00 GB" in roomy[0]
    flags = tiny.flags(tmp_path / "again", max_steps=1)
    tight = ranks(2, "tests.work.plan:run_with_room", flags=flags, room=1000)
    assert tight[0].count("does not fit") == 1 and "result" in tight[0]


def test_the_command_of_the_warning_works_when_loading_died(
    ranks: RealRanks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path / "run", max_steps=1)
    (said,) = ranks(1, "tests.work.plan:run_that_dies_loading", flags=flags, room=1001)
    command = said.partition("plan: python launcher/plan.py ")[2].partition(")")[0].split()
    found = load_request(command)
    assert found.plan.gpu_bytes == 0 and found.plan.host_bytes == 1001
    assert found.config.adapter.rank == 4
    # What died so is no run yet: it starts again in the same folder.
    assert "result" in ranks(1, "tests.work.plan:run_with_room", flags=flags, room=10**10)[0]


def test_keys_that_are_not_planned_for_are_named(tmp_path: Path, two_layers: str) -> None:
    content = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    content["zero_optimization"]["stage3_module_granularity_threshold"] = 0
    (tmp_path / "engine.json").write_text(json.dumps(content))
    run = {"model": two_layers, "ds_config": str(tmp_path / "engine.json")}
    assert as_json(outcome(**run))["notes"] == []
    content["zero_optimization"]["stage3_module_granularity_threshold"] = 1000
    content["zero_optimization"]["stage3_model_persistence_threshold"] = 0
    (tmp_path / "engine.json").write_text(json.dumps(content))
    found = outcome(**run)
    text, notes = as_text(found), as_json(found)["notes"]
    for key in ("stage3_module_granularity_threshold", "stage3_model_persistence_threshold"):
        assert f"does not take {key} of the engine file into account" in text
        assert any(key in note for note in notes)


def test_cpu_ranks_without_a_limit_are_not_said_to_fit(two_layers: str) -> None:
    run = {"model": two_layers, "gpu_memory": "0"}
    free = outcome(**run)
    assert "verdict   not checked" in as_text(free) and as_json(free)["fits"] is None
    assert "DOES NOT FIT" in as_text(outcome(host_memory="1GB", **run))
    assert "verdict   fits" in as_text(outcome(host_memory="9TB", **run))


def test_no_time_of_a_step_is_said_of_cpus_whose_rate_is_not_known() -> None:
    """It said 10 million tokens a second of two CPU ranks."""
    options = {"world_size": 2, "gpu_memory": "0"}
    unknown, known = outcome(**options), outcome(**options, tflops=0.1)
    assert unknown.speed.step_s is None and "tokens/s" not in as_text(unknown)
    assert as_json(unknown)["speed"]["step_s_overlapped"] is None
    assert known.speed.compute_s == pytest.approx(known.speed.flop / 1e11)
    assert "tokens/s" in as_text(known)
    assert outcome(world_size=2).speed.compute_s == pytest.approx(known.speed.flop / 1e14)
