"""DeepSpeed JSON file (ds_configs/*.json) + ``Config`` -> the dict that DeepSpeed gets.

The file sets mechanics and the options of the run set training numbers; a number that both set to
different values is an error. The file is checked here against the keys that this project supports,
because DeepSpeed 0.19 does not check all of it: it rejects unknown keys in ``zero_optimization``
and ``bf16``, but only when the engine is built, one at a time; it ignores unknown keys at the top
level and in ``aio``, takes ``"stage": "auto"`` as stage 0, and keeps ``"auto"`` as a gradient
clipping value.
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

NEVER = 2**31 - 1  # no run has so many steps
DEFAULTS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "steps_per_print": NEVER,
}


def check_engine_file(path: str) -> list[str]:
    """Return every problem of the file at ``path``, each with its place."""
    problems: list[str] = []
    engine = read_engine_file(path, problems)
    return problems if engine is None else problems + check_engine(engine, path)


def read_engine_file(path: str, problems: list[str]) -> EngineDict | None:
    """Return the file's content, or None with the reason appended to ``problems``."""

    def without_doubles(pairs: list[tuple[str, Any]]) -> EngineDict:
        names = [name for name, _ in pairs]
        doubles = {name for name in names if names.count(name) > 1}
        problems.extend(f"{path}: {name} is set twice in one block" for name in sorted(doubles))
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
    """Return every problem of a file's content; ``place`` names the file in messages."""
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
                f"{place}: zero_optimization sets zero_hpz_partition_size and offload_param.device "
                "nvme, but a node's copy of the parameters cannot be kept on NVMe: remove one of "
                "the two, or set the device to cpu"
            )
    return problems


def check_block(
    block: Mapping[str, Any], keys: Mapping[str, Any], prefix: str, place: str
) -> list[str]:
    """Return the problems of one ``{...}`` block, given the keys it may have."""
    problems = []
    for key, value in block.items():
        name = prefix + key
        if key not in keys:
            why = KNOWN_ELSEWHERE.get(name) or "not a supported key" + did_you_mean(key, keys)
            problems.append(f"{place}: {name}: {why}")
        elif isinstance(keys[key], dict) and isinstance(value, dict):
            problems += check_block(value, keys[key], f"{name}.", place)
        else:
            problems += check_value(name, value, keys[key], place)
    return problems


def check_value(name: str, value: object, kind: Any, place: str) -> list[str]:
    """Return a problem if the value has the wrong kind or is not the only one that works here."""
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
    why = WHY_NOT.get(name, "") if value != "auto" else "auto is only for numbers of the run"
    return [f"{said}; must be {kind_in_words(kind)}" + (f": {why}" if why else "")]


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of this kind. Numbers must be at least 0; 5e8 counts as whole."""
    if isinstance(kind, tuple):
        return value in kind
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value < float("inf") and (kind is float or value == int(value))
    return isinstance(value, kind if isinstance(kind, type) else dict)


def kind_in_words(kind: Any) -> str:
    """Describe a kind of value for a message."""
    if isinstance(kind, tuple):
        return "one of " + ", ".join(kind)
    if isinstance(kind, dict):
        return "a {...} block"
    words = {bool: "true or false", int: "a whole number from 0 up", float: "a number from 0 up"}
    return words.get(kind, "text")


def engine_dict(source: str | EngineDict, config: Config, world_size: int) -> EngineDict:
    """Build the dict for ``deepspeed.initialize``: the file with the run's numbers filled in.

    Args:
        source: path of the JSON file, or its content.
        config: options of the run.
        world_size: number of ranks.

    Returns:
        A new dict; ``source`` is left unchanged.

    Raises:
        ConfigError: with all problems of the file and all numbers that differ from the run's.
    """
    engine, place = load(source)
    raise_if(check_engine(engine, place))
    problems = conflicts(source, config)
    problems += world_problems(engine, config, world_size, place)
    raise_if(problems)
    engine = DEFAULTS | copy.deepcopy(engine)
    engine.pop("train_batch_size", None)  # DeepSpeed computes it from the numbers set below
    for key, value in training_numbers(config).items():
        set_at(engine, key, value)
    set_at(engine, "data_types.grad_accum_dtype", "fp32")
    return engine


def conflicts(source: str | EngineDict, config: Config, *, trains: bool = True) -> list[str]:
    """Compare a well-formed file with the options of the run.

    Args:
        source: path of the JSON file, or its content.
        config: options of the run.
        trains: whether to check the NVMe folder too.

    Returns:
        One problem per number that differs, and one if the NVMe folder cannot be written to.
    """
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
    """Check the numbers of a file that depend on the number of ranks.

    Args:
        engine: content of the DeepSpeed file.
        config: options of the run.
        world_size: number of ranks.
        place: name of the file for messages.
    """
    problems = []
    train = config.train
    rows = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    if engine.get("train_batch_size", "auto") not in ("auto", rows):
        problems.append(differs(place, "train_batch_size", engine["train_batch_size"], rows))
    node = value_at(engine, "zero_optimization.zero_hpz_partition_size") or 1
    if world_size % node:
        problems.append(
            f"{place}: zero_optimization.zero_hpz_partition_size is {node}, "
            f"which does not divide the {world_size} ranks; set it to the number of ranks per node"
        )
    return problems


def training_numbers(config: Config) -> dict[str, object]:
    """Return {DeepSpeed key: the run's number}."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16.enabled": config.model.precision == "bf16",
    }


def differs(place: str, key: str, theirs: object, ours: object) -> str:
    """Return the problem of a number that file and run set differently."""
    return (
        f"{place}: {key} is {json.dumps(theirs)}, but {OWNED[key]} of the run says "
        f'{json.dumps(ours)}; write "auto" in the file'
    )


def load(source: str | EngineDict) -> tuple[EngineDict, str]:
    """Read a DeepSpeed file.

    Args:
        source: path of the JSON file, or its content.

    Returns:
        (content, name for messages).

    Raises:
        ConfigError: the file cannot be read.
    """
    if not isinstance(source, str):
        return source, "engine config"
    problems: list[str] = []
    engine = read_engine_file(source, problems)
    raise_if(problems)
    assert engine is not None, "raise_if has raised for an unreadable file"
    return engine, source


def value_at(engine: Mapping[str, Any], dotted: str) -> Any:
    """Return the value at the path ``a.b.c``; None if a part of the path is missing."""
    value: Any = engine
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def set_at(engine: EngineDict, dotted: str, value: object) -> None:
    """Set the value at the path ``a.b``; create the block ``a`` if it is missing."""
    *way, last = dotted.split(".")
    for key in way:
        engine = engine.setdefault(key, {})
    engine[last] = value
