"""What a ds_configs/ file may say, and what DeepSpeed gets from it."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import get_timers_config

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import (
    check_engine_file,
    conflicts,
    differs,
    engine_dict,
)
from sparse_lora_dist.config.deepspeed_keys import (
    AT_LEAST_ONE,
    FIXED,
    KEYS,
    KNOWN_ELSEWHERE,
    OWNED,
    WHY_NOT,
)
from sparse_lora_dist.config.sections import ModelConfig, TrainConfig
from sparse_lora_dist.errors import ConfigError

SHIPPED = sorted(Path(__file__).parents[2].glob("ds_configs/*.json"))
MINIMAL = {"zero_optimization": {"stage": 3}}


def with_key(dotted: str, value: object) -> dict:
    """The smallest good file with one more key."""
    engine = json.loads(json.dumps(MINIMAL))
    block = engine
    *way, last = dotted.split(".")
    for key in way:
        block = block.setdefault(key, {})
    block[last] = value
    return engine


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that writes x.json and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(content: object) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        Path("x.json").write_text(text)
        return "x.json"

    return write


def test_five_files_are_shipped():
    names = ["whole", "zero3", "zero3_hpz", "zero3_nvme", "zero3_offload"]
    assert [p.stem for p in SHIPPED] == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_file_is_good_and_reduces_in_fp32(path):
    assert check_engine_file(str(path)) == []
    engine = json.loads(path.read_text())
    assert engine["communication_data_type"] == "fp32"
    assert engine["data_types"] == {"grad_accum_dtype": "fp32"}
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert engine[key] == "auto"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("zero_optimization.stage", 2, "must be 3, because only stage 3 shards"),
        ("zero_optimization.stage", "3", 'is "3", but it must be 3'),
        ("zero_optimization.stage", 3.0, "must be 3"),
        ("zero_optimization.stage", True, "must be 3"),
        ("zero_optimisation", {"stage": 3}, "did you mean zero_optimization?"),
        ("zero_optimization.stage3_max_live_parameter", 1, "mean stage3_max_live_parameters?"),
        ("zero_optimization.reduce_bucket_size", "5e8", "must be a whole number from 0 up"),
        ("zero_optimization.reduce_bucket_size", "auto", "auto is only for numbers of the run"),
        ("zero_optimization.reduce_bucket_size", -1, "must be a whole number from 0 up"),
        ("zero_optimization.reduce_bucket_size", 1.5, "must be a whole number from 0 up"),
        ("zero_optimization.reduce_bucket_size", True, "must be a whole number from 0 up"),
        ("zero_optimization.overlap_comm", 1, "must be true or false"),
        ("zero_optimization.overlap_comm", "true", "must be true or false"),
        ("zero_optimization.zero_quantized_weights", True, "are packed bytes"),
        ("zero_optimization.zero_quantized_nontrainable_weights", True, "are packed bytes"),
        ("zero_optimization.stage3_use_all_reduce_for_fetch_params", True, "are packed bytes"),
        ("zero_optimization.zero_quantized_gradients", True, "must be false"),
        ("zero_optimization.offload_param", "cpu", "must be a {...} block"),
        ("zero_optimization.offload_param.device", "disk", "one of none, cpu, nvme"),
        ("zero_optimization.offload_param.device", ["cpu"], "one of none, cpu, nvme"),
        ("zero_optimization.offload_param.device", "nvme", "no nvme_path"),
        ("zero_optimization.offload_param.pinned", True, "not a supported key"),
        ("zero_optimization.offload_param.max_in_cpu", 0, "trained tensors stay in memory"),
        ("zero_optimization.offload_param.buffer_count", 0, "must be at least 1"),
        ("aio.block_size", 0, "must be at least 1"),
        ("steps_per_print", 0, "must be at least 1"),
        ("aio.use_gds", True, "must be false"),
        ("zero_optimization.offload_optimizer.device", "nvme", "needs moments of every entry"),
        (
            "optimizer",
            {"type": "AdamW"},
            "optimizer is set by options here. Remove it and set --learning_rate",
        ),
        (
            "scheduler",
            {"type": "WarmupLR"},
            "scheduler is set by options here. Remove it and set --lr_schedule",
        ),
        ("fp16", {"enabled": True}, "fp16.enabled is true, but it must be false"),
        ("amp", {"enabled": True}, "not a supported key"),
        ("bfloat16", {"enabled": True}, "Write bf16"),
        ("zero_optimization.reduce_bucket_size", 0, "must be at least 1"),
        ("zero_optimization.reduce_bucket_size", 2**63, r"from 0 up (below 2**63)"),
        ("zero_optimization.reduce_bucket_size", 2**63 - 1, "must be at most 1099511627776"),
        ("zero_optimization.reduce_bucket_size", 1e18, "must be at most 1099511627776"),
        ("zero_optimization.offload_param.buffer_size", 2**63 - 1, "at most 1099511627776"),
        ("zero_optimization.offload_param.buffer_count", 2**63 - 1, "must be at most 1048576"),
        ("aio.block_size", 2**31, "must be at most 1073741824"),
        ("aio.queue_depth", 2**31, "must be at most 1048576"),
        ("aio.intra_op_parallelism", 2**31, "must be at most 1024"),
        ("bf16.enabled", "yes", "must be true or false"),
        ("bf16", True, "must be a {...} block"),
        ("communication_data_type", "bf16", 'must be "fp32", because importance statistics'),
        ("data_types.grad_accum_dtype", "bf16", 'must be "fp32", because importance statistics'),
        ("zero_force_ds_cpu_optimizer", True, "must be false"),
        ("zero_allow_untested_optimizer", False, "must be true"),
        ("train_micro_batch_size_per_gpu", "8", "must be a whole number"),
        ("gradient_clipping", "1.0", "must be a number from 0 up"),
        ("gradient_clipping", None, "is null, but it must be a number"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(file, key, value, words):
    (problem,) = check_engine_file(file(with_key(key, value)))
    assert problem.startswith(f"x.json: {key}") or problem.startswith("x.json: zero_optimization")
    assert words in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n"zero_optimization": {"stage": 3},\n}', "x.json line 3 is not valid JSON"),
        ("[]", "must hold one {...} object"),
        ("{}", "zero_optimization.stage is missing"),
        ('{"zero_optimization": true}', "zero_optimization is true, but it must be a {...} block"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "stage is set twice"),
        ('{"zero_optimization": {"stage": 3}, "gradient_clipping": NaN}', "must be a number"),
    ],
)
def test_a_broken_file_is_one_problem(file, text, words):
    (problem,) = check_engine_file(file(text))
    assert words in problem


def test_missing_file(tmp_path):
    path = str(tmp_path / "none.json")
    (problem,) = check_engine_file(path)
    assert problem.startswith(f"--ds_config {path} does not exist")


def test_all_problems_of_a_file_come_at_once(file):
    engine = {"optimizer": {}, "zero_optimization": {"stage": 1, "overlap": True}, "fp16": {}}
    assert len(check_engine_file(file(engine))) == 3


@pytest.mark.parametrize("value", [5e8, 500_000_000, 0])
def test_whole_numbers_may_be_written_as_5e8(file, value):
    assert check_engine_file(file(with_key("zero_optimization.sub_group_size", value))) == []


@pytest.mark.parametrize("key", ["sub_group_size", "stage3_max_live_parameters"])
def test_a_number_that_nothing_is_allocated_by_may_be_as_large_as_deepspeed_takes_it(file, key):
    assert check_engine_file(file(with_key(f"zero_optimization.{key}", 2**63 - 1))) == []


# One owner per number

RUN = Config(
    train=TrainConfig(micro_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.5)
)


def test_auto_becomes_the_number_of_the_run():
    engine = MINIMAL | dict.fromkeys(OWNED.keys() - {"bf16.enabled"}, "auto")
    engine["bf16"] = {"enabled": "auto"}
    got = engine_dict(engine, RUN, world_size=3)
    assert got["train_micro_batch_size_per_gpu"] == 4
    assert got["gradient_accumulation_steps"] == 2
    assert got["gradient_clipping"] == 0.5
    assert got["bf16"] == {"enabled": True}
    assert "auto" not in json.dumps(got)


def test_what_the_file_leaves_out_is_filled_in():
    got = engine_dict(MINIMAL, RUN, world_size=1)
    assert got["zero_allow_untested_optimizer"] is True
    assert got["zero_force_ds_cpu_optimizer"] is False
    assert got["communication_data_type"] == "fp32"
    assert got["data_types"] == {"grad_accum_dtype": "fp32"}
    assert got["train_micro_batch_size_per_gpu"] == 4


def test_deepspeed_does_not_wait_for_the_gpu_to_tell_a_speed():
    """Its timer synchronises the device at the start of every micro-batch and the end of steps."""
    engine = engine_dict(MINIMAL, Config(), 1)
    assert get_timers_config(engine).enabled is False


def test_the_source_is_left_as_it_was():
    source = with_key("bf16.enabled", "auto")
    engine_dict(source, RUN, world_size=1)
    assert source == with_key("bf16.enabled", "auto")


def test_fp32_turns_bf16_off():
    config = Config(model=ModelConfig(precision="fp32"))
    assert engine_dict(MINIMAL, config, world_size=1)["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("key", "same", "other", "owner"),
    [
        ("train_micro_batch_size_per_gpu", 4, 8, "--micro_batch_size"),
        ("gradient_accumulation_steps", 2, 1, "--gradient_accumulation_steps"),
        ("gradient_clipping", 0.5, 1.0, "--max_grad_norm"),
        ("bf16.enabled", True, False, "--precision"),
        ("train_batch_size", 24, 8, "--micro_batch_size x --gradient_accumulation_steps x ranks"),
    ],
)
def test_a_number_in_two_places_must_be_the_same(file, key, same, other, owner):
    engine_dict(file(with_key(key, same)), RUN, world_size=3)
    with pytest.raises(ConfigError) as caught:
        engine_dict(file(with_key(key, other)), RUN, world_size=3)
    (problem,) = caught.value.problems
    assert problem.startswith(f"x.json: {key} is {json.dumps(other)}, but {owner} of the run is")


def test_bad_content_never_reaches_deepspeed():
    with pytest.raises(
        ConfigError, match="the DeepSpeed configuration: optimizer is set by options here"
    ):
        engine_dict(MINIMAL | {"optimizer": {}}, RUN, world_size=1)


def test_hpz_group_must_divide_the_ranks():
    engine = with_key("zero_optimization.zero_hpz_partition_size", 2)
    engine_dict(engine, RUN, world_size=4)
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        engine_dict(engine, RUN, world_size=3)


def test_all_that_nvme_does_not_go_with_comes_at_once(file):
    engine = json.loads(json.dumps(MINIMAL))
    engine["zero_optimization"] |= {
        "offload_param": {"device": "nvme", "nvme_path": "/", "buffer_count": 0},
        "offload_optimizer": {"device": "nvme"},
        "zero_hpz_partition_size": 2,
    }
    problems = "\n".join(check_engine_file(file(engine)))
    for words in ("needs moments of every entry", "a node's copy", "buffer_count is 0"):
        assert words in problems
    engine["zero_optimization"]["offload_param"] = {"device": "cpu"}
    engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    assert check_engine_file(file(engine)) == []


def test_nvme_folder_must_be_there(tmp_path):
    engine = with_key("zero_optimization.offload_param.device", "nvme")
    engine["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    assert conflicts(engine, RUN) == []
    engine["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "none")
    (problem,) = conflicts(engine, RUN)
    assert "nvme_path must be a folder you can write to" in problem


# The tables


def test_every_special_key_is_in_the_tables():
    def names(keys: dict, prefix: str = "") -> set[str]:
        inner = [names(v, f"{prefix}{k}.") for k, v in keys.items() if isinstance(v, dict)]
        return {prefix + k for k in keys}.union(*inner)

    known = names(KEYS)
    assert known >= FIXED.keys() | OWNED.keys() | WHY_NOT.keys() | AT_LEAST_ONE
    assert known.isdisjoint(KNOWN_ELSEWHERE)


def test_deepspeed_knows_every_key_of_its_blocks():
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = zero_config.DeepSpeedZeroConfig.model_fields
    names = {field.alias or name for name, field in fields.items()}
    assert names >= KEYS["zero_optimization"].keys()
    for block in ("offload_param", "offload_optimizer"):
        (model, _) = fields[block].annotation.__args__
        assert model.model_fields.keys() >= KEYS["zero_optimization"][block].keys()


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", True), ("bf16", False)])
def test_another_precision_in_the_file_is_named_as_the_option_has_it(
    precision: str, enabled: bool
) -> None:
    said = differs("x.json", "bf16.enabled", enabled, precision == "bf16")
    assert f"{json.dumps(enabled)}, but --precision of the run is {precision}. Write" in said
