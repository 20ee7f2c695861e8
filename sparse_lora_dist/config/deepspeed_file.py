"""ds_configs/*.json + Config -> the dict DeepSpeed gets.

The file owns mechanics, the run config owns training numbers; a number set in both and different is
an error. DeepSpeed takes unknown keys, "auto" and ``"stage": "3"`` without a word, so the file is
checked here, against the keys this project supports, before the engine sees it.
"""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_keys import (
    AT_LEAST_ONE,
    FIXED,
    KEYS,
    KNOWN_ELSEWHERE,
    OWNED,
    WHY_NOT,
)
from sparse_lora_dist.config.spelling import did_you_mean

EngineDict = dict[str, Any]

NEVER = 2**31 - 1  # a step that no run reaches
DEFAULTS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "steps_per_print": NEVER,
}


def check_engine_file(path: str) -> list[str]:
    """Every problem of the file itself, each with its place."""
    problems: list[str] = []
    engine = read_engine_file(path, problems)
    return problems if engine is None else problems + check_engine(engine, path)


def read_engine_file(path: str, problems: list[str]) -> EngineDict | None:
    """The file's content, or None with the reason added to ``problems``."""

    def without_doubles(pairs: list[tuple[str, Any]]) -> EngineDict:
        names = [name for name, _ in pairs]
        doubles = {name for name in names if names.count(name) > 1}
        problems.extend(f"{path}: {name} stands twice in one block" for name in sorted(doubles))
        return dict(pairs)

    try:
        content = json.loads(Path(path).read_text("utf-8"), object_pairs_hook=without_doubles)
    except FileNotFoundError:
        problems.append(f"ds_config: no such file: {path}")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"ds_config: {path} cannot be read: {error}")
    except json.JSONDecodeError as error:
        problems.append(f"{path} line {error.lineno}: not JSON: {error.msg}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{path} must hold one {{...}} object, got {content!r}")
    return None


def check_engine(engine: Mapping[str, Any], place: str) -> list[str]:
    """Every problem of the content; ``place`` is the file to name."""
    problems = check_block(engine, KEYS, "", place)
    zero = engine.get("zero_optimization", {})
    if isinstance(zero, dict):
        if "stage" not in zero:
            problems.append(f"{place}: zero_optimization.stage is missing; must be 3")
        param = zero.get("offload_param")
        if isinstance(param, dict) and param.get("device") == "nvme" and "nvme_path" not in param:
            problems.append(f"{place}: zero_optimization.offload_param needs nvme_path for nvme")
        node = zero.get("zero_hpz_partition_size", 1)
        if isinstance(param, dict) and param.get("device") == "nvme" and node not in (0, 1):
            problems.append(
                f"{place}: zero_optimization has zero_hpz_partition_size and offload_param.device "
                "nvme; a node's copy lies where parameters do, and there is none on NVMe: "
                "remove one, or write cpu"
            )
    return problems


def check_block(
    block: Mapping[str, Any], keys: Mapping[str, Any], prefix: str, place: str
) -> list[str]:
    """The problems of one ``{...}`` block against the keys it may have."""
    problems = []
    for key, value in block.items():
        name = prefix + key
        if key not in keys:
            why = KNOWN_ELSEWHERE.get(name) or "no supported key" + did_you_mean(key, keys)
            problems.append(f"{place}: {name}: {why}")
        elif isinstance(keys[key], dict) and isinstance(value, dict):
            problems += check_block(value, keys[key], f"{name}.", place)
        else:
            problems += check_value(name, value, keys[key], place)
    return problems


def check_value(name: str, value: object, kind: Any, place: str) -> list[str]:
    """A line when ``value`` is of the wrong kind, or is not the one value that works here."""
    if name in OWNED and value == "auto":
        return []
    said = f"{place}: {name} is {json.dumps(value)}"
    if name in FIXED:
        wanted, why = FIXED[name]
        right = value == wanted and type(value) is type(wanted)
        return [] if right else [f"{said}; must be {json.dumps(wanted)}: {why}"]
    if name in AT_LEAST_ONE and value == 0:
        return [f"{said}; must be at least 1"]
    if fits(value, kind):
        return []
    why = WHY_NOT.get(name, "") if value != "auto" else "auto is for numbers of the run config only"
    return [f"{said}; must be {kind_in_words(kind)}" + (f": {why}" if why else "")]


def fits(value: Any, kind: Any) -> bool:
    """Is ``value`` of this kind? Numbers are at least 0, and 5e8 is a whole one."""
    if isinstance(kind, tuple):
        return value in kind
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value < float("inf") and (kind is float or value == int(value))
    return isinstance(value, kind if isinstance(kind, type) else dict)


def kind_in_words(kind: Any) -> str:
    """What a value of this kind is, for a message."""
    if isinstance(kind, tuple):
        return "one of " + ", ".join(kind)
    if isinstance(kind, dict):
        return "a {...} block"
    words = {bool: "true or false", int: "a whole number from 0 up", float: "a number from 0 up"}
    return words.get(kind, "text")


def engine_dict(source: str | EngineDict, config: Config, world_size: int) -> EngineDict:
    """What ``deepspeed.initialize`` gets: the file (or its content) with the run's numbers in it.

    Raises:
        ConfigError: with every problem of the file, and every number that differs from the run's.
    """
    engine, place = load(source)
    raise_if(check_engine(engine, place))
    problems = conflicts(source, config)
    problems += world_problems(engine, config, world_size, place)
    raise_if(problems)
    engine = DEFAULTS | copy.deepcopy(engine)
    engine.pop("train_batch_size", None)  # follows from the two below
    for key, value in training_numbers(config).items():
        set_at(engine, key, value)
    set_at(engine, "data_types.grad_accum_dtype", "fp32")
    return engine


def conflicts(source: str | EngineDict, config: Config, *, trains: bool = True) -> list[str]:
    """Every number of a well-formed file that differs from the run's, and a missing NVMe folder
    where a run is to train here."""
    engine, place = load(source)
    problems = [
        differs(place, key, value_at(engine, key), ours)
        for key, ours in training_numbers(config).items()
        if value_at(engine, key) not in (None, "auto", ours)
    ]
    param = value_at(engine, "zero_optimization.offload_param") or {}
    if trains and param.get("device") == "nvme" and not os.access(param["nvme_path"], os.W_OK):
        problems.append(
            f"{place}: zero_optimization.offload_param.nvme_path must be a folder you can "
            f"write to, got {param['nvme_path']!r}"
        )
    return problems


def world_problems(engine: EngineDict, config: Config, world_size: int, place: str) -> list[str]:
    """What does not fit this number of ranks."""
    problems = []
    train = config.train
    rows = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    if engine.get("train_batch_size", "auto") not in ("auto", rows):
        problems.append(differs(place, "train_batch_size", engine["train_batch_size"], rows))
    node = value_at(engine, "zero_optimization.zero_hpz_partition_size") or 1
    if world_size % node:
        problems.append(
            f"{place}: zero_optimization.zero_hpz_partition_size is {node}, "
            f"which does not divide the {world_size} ranks; set it to the ranks of one node"
        )
    return problems


def training_numbers(config: Config) -> dict[str, object]:
    """{engine key: the run's number}."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16.enabled": config.model.precision == "bf16",
    }


def differs(place: str, key: str, theirs: object, ours: object) -> str:
    """The line for a number that is set in two places."""
    return (
        f"{place}: {key} is {json.dumps(theirs)}, but {OWNED[key]} of the run says "
        f'{json.dumps(ours)}; write "auto" in the file'
    )


def load(source: str | EngineDict) -> tuple[EngineDict, str]:
    """(content, name for messages) of a file or of content itself."""
    if not isinstance(source, str):
        return source, "engine config"
    problems: list[str] = []
    engine = read_engine_file(source, problems)
    raise_if(problems)
    assert engine is not None, "neither content nor a problem"
    return engine, source


def value_at(engine: Mapping[str, Any], dotted: str) -> Any:
    """The value under ``a.b.c``; None when a part of the way is not there."""
    value: Any = engine
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def set_at(engine: EngineDict, dotted: str, value: object) -> None:
    """Puts ``value`` under ``a.b``, making the block ``a`` when it is not there."""
    *way, last = dotted.split(".")
    for key in way:
        engine = engine.setdefault(key, {})
    engine[last] = value
