"""Check a DeepSpeed JSON file (ds_configs/*.json), and fill in the numbers of the run.

The file sets how DeepSpeed works (ZeRO stage, offload, bucket sizes). The options of the run set
training numbers, such as the batch size. If both set a number to different values, that is an
error.

The file is checked here because DeepSpeed 0.19 does not check all of it. It rejects unknown keys in
``zero_optimization`` and ``bf16``, but only when the engine is built, one at a time. It ignores
unknown keys at the top level and in ``aio``, takes ``"stage": "auto"`` as stage 0, and keeps
``"auto"`` as a gradient clipping value.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_keys import (
    AT_LEAST_ONE,
    AT_MOST,
    FIXED,
    KEYS,
    KNOWN_ELSEWHERE,
    OWNED,
    WHY_NOT,
)
from sparse_lora_dist.config.paths import bad_path
from sparse_lora_dist.config.spelling import did_you_mean
from sparse_lora_dist.system.shipped import ENGINE
from sparse_lora_dist.system.small_files import parse_json, text_of

EngineDict = dict[str, Any]
"""Content of a DeepSpeed file, or the dict that ``deepspeed.initialize`` gets."""

NVME_PATH = "zero_optimization.offload_param.nvme_path"
LARGEST = 2**63
"""Numbers must be smaller."""
MOST_WRONG = 30
"""Largest number of wrong keys of a block that are named."""
NEVER = 2**31 - 1  # no run has so many steps
DEFAULTS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "steps_per_print": NEVER,
    "timers": {"throughput": {"enabled": False}},
}
"""{DeepSpeed key: value} that is used where the file has no such key. DeepSpeed's timer of
throughput would wait for the GPU at the beginning of every micro-batch; a run has a clock of its
own."""


def check_engine_file(path: str) -> list[str]:
    """Return a message for every problem of the DeepSpeed file at ``path``; no messages if it is
    right.

    Numbers that the options of the run set are compared by ``conflicts``, not here.
    """
    problems: list[str] = []
    engine = read_engine_file(path, problems)
    return problems if engine is None else problems + check_engine(engine, ENGINE.find(path))


def read_engine_file(path: str, problems: list[str]) -> EngineDict | None:
    """Read a DeepSpeed file.

    Args:
        path: Path of the JSON file, or its name in ds_configs/.
        problems: List of messages. One is appended if the file cannot be read, and one for each key
            that is set twice.

    Returns:
        Content of the file, or None if it cannot be read.
    """

    def without_doubles(pairs: list[tuple[str, Any]]) -> EngineDict:
        doubles = [name for name, count in Counter(n for n, _ in pairs).items() if count > 1]
        problems.extend(
            f"{path}: {name} is set twice in one block. Remove one" for name in sorted(doubles)
        )
        return dict(pairs)

    try:
        content = parse_json(text_of(ENGINE.find(path)), without_doubles)
    except FileNotFoundError:
        problems.append(f"--ds_config {path} does not exist. {ENGINE.allowed()}")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"--ds_config {path} cannot be read: {error}")
    except json.JSONDecodeError as error:
        problems.append(f"{path} line {error.lineno} is not valid JSON: {error.msg}")
    except ValueError as error:
        problems.append(f"{path} is not valid JSON: {error}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{path} must hold one {{...}} object, but holds {in_json(content)}")
    return None


def check_engine(engine: Mapping[str, Any], place: str) -> list[str]:
    """Return a message for every problem of a DeepSpeed file's content.

    Args:
        engine: Content of the file.
        place: Name of the file, with which messages begin.
    """
    problems = check_block(engine, KEYS, "", place)
    zero = engine.get("zero_optimization", {})
    if isinstance(zero, dict):
        if "stage" not in zero:
            problems.append(f"{place}: zero_optimization.stage is missing. Set it to 3")
        param = zero.get("offload_param")
        if isinstance(param, dict) and param.get("device") == "nvme" and "nvme_path" not in param:
            problems.append(
                f"{place}: zero_optimization.offload_param has device nvme, but no nvme_path. Set "
                "nvme_path to a folder on the NVMe disk"
            )
        node = zero.get("zero_hpz_partition_size", 1)
        if isinstance(param, dict) and param.get("device") == "nvme" and node not in (0, 1):
            problems.append(
                f"{place}: zero_optimization sets zero_hpz_partition_size and offload_param.device "
                "nvme, but a node's copy of the parameters cannot be kept on NVMe. Remove one of "
                "the two, or set the device to cpu"
            )
    return problems


def check_block(
    block: Mapping[str, Any], keys: Mapping[str, Any], prefix: str, place: str
) -> list[str]:
    """Return a message for every problem of one ``{...}`` block and of the blocks in it.

    Args:
        block: Content of the block.
        keys: Keys that the block may have, as in ``KEYS``.
        prefix: Path of the block with a dot at its end, e.g. "zero_optimization."; empty for the
            whole file.
        place: Name of the file, with which messages begin.
    """
    problems: list[str] = []
    for key, value in block.items():
        if len(problems) == MOST_WRONG:  # no file for DeepSpeed, and each needs a suggestion
            return [*problems, f"{place} has further wrong keys"]
        name = prefix + key
        if key not in keys:
            why = KNOWN_ELSEWHERE.get(name) or "is not a supported key" + did_you_mean(key, keys)
            problems.append(f"{place}: {name} {why}")
        elif isinstance(keys[key], dict) and isinstance(value, dict):
            problems += check_block(value, keys[key], f"{name}.", place)
        else:
            problems += check_value(name, value, keys[key], place)
    return problems


def check_value(name: str, value: Any, kind: Any, place: str) -> list[str]:
    """Check that a value of the DeepSpeed file has the right type and is one that works here.

    Args:
        name: Dotted path of the key, e.g. "zero_optimization.stage".
        value: Its value in the file.
        kind: What the value may be, as ``KEYS`` has it for this key: a type, or allowed values.
        place: Name of the file, with which messages begin.

    Returns:
        A list with one message, or an empty list if the value is right.
    """
    if name in OWNED and value == "auto":
        return []
    said = f"{place}: {name} is {in_json(value)}"
    if name in FIXED:
        wanted, why = FIXED[name]
        right = value == wanted and type(value) is type(wanted)
        return [] if right else [f"{said}, but it must be {json.dumps(wanted)}, because {why}"]
    if name == NVME_PATH and isinstance(value, str) and bad_path(name, value):
        return bad_path(f"{place}: {name}", value)
    if name in AT_LEAST_ONE and value == 0:
        return [f"{said}, but it must be at least 1"]
    if fits(value, kind):
        too_large = name in AT_MOST and value > AT_MOST[name]
        return [f"{said}, but it must be at most {AT_MOST[name]}"] if too_large else []
    why = WHY_NOT.get(name, "") if value != "auto" else "auto is only for numbers of the run"
    return [f"{said}, but it must be {kind_in_words(kind)}" + (f", because {why}" if why else "")]


def in_json(value: object) -> str:
    """Return a value as JSON for a message; a long one is cut."""
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def fits(value: Any, kind: Any) -> bool:
    """Return True if a value of a DeepSpeed file is allowed.

    Numbers must be at least 0. A float such as 5e8 passes as a whole number.

    Args:
        value: Value in the file.
        kind: What the value may be, an entry of ``KEYS``: a type, a tuple of words, or a dict.
    """
    if isinstance(kind, tuple):
        return value in kind
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value < LARGEST and (kind is float or value == int(value))
    return isinstance(value, kind if isinstance(kind, type) else dict)


def kind_in_words(kind: Any) -> str:
    """Return in words which values an entry of ``KEYS`` allows, e.g. "true or false".

    Args:
        kind: The entry: a type, a tuple of words, or a dict.
    """
    if isinstance(kind, tuple):
        return "one of " + ", ".join(kind)
    if isinstance(kind, dict):
        return "a {...} block"
    words = {
        bool: "true or false",
        int: "a whole number from 0 up (below 2**63)",
        float: "a number from 0 up (below 2**63)",
    }
    return words.get(kind, "text")


def engine_dict(source: str | EngineDict, config: Config, world_size: int) -> EngineDict:
    """Return the dict for ``deepspeed.initialize``: the file with the numbers of the run filled in.

    Makes no collective.

    Args:
        source: Path of the JSON file, or its content, which is not changed.
        config: Options of the run.
        world_size: Number of ranks.

    Raises:
        ConfigError: The file has problems, or a number in it differs from the run's.
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
    """Return a message for each number of the file that differs from the options of the run.

    Args:
        source: Path of the JSON file, or its content, which has passed ``check_engine``.
        config: Options of the run.
        trains: True: also return a message if the NVMe folder cannot be written to.
    """
    engine, place = load(source)
    problems = [
        differs(place, key, value_at(engine, key), ours)
        for key, ours in training_numbers(config).items()
        if value_at(engine, key) not in (None, "auto", ours)
    ]
    leaves = "zero_optimization.stage3_module_granularity_threshold"
    whole_layers = (value_at(engine, leaves) or 0) > 0
    if trains and whole_layers and not config.model.gradient_checkpointing:
        problems.append(
            f"{place}: {leaves} needs --gradient_checkpointing true. Without it DeepSpeed frees "
            "weights that the backward pass still uses"
        )
    param = value_at(engine, "zero_optimization.offload_param") or {}
    if trains and param.get("device") == "nvme" and not os.access(param["nvme_path"], os.W_OK):
        problems.append(
            f"{place}: {NVME_PATH} must be a folder you can write to, got {param['nvme_path']!r}"
        )
    return problems


def world_problems(engine: EngineDict, config: Config, world_size: int, place: str) -> list[str]:
    """Return a message for each number of the file that does not fit the number of ranks.

    Args:
        engine: Content of the DeepSpeed file.
        config: Options of the run.
        world_size: Number of ranks.
        place: Name of the file, with which messages begin.
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
            f"which does not divide the {world_size} ranks. Set it to the number of ranks per node"
        )
    return problems


def training_numbers(config: Config) -> dict[str, object]:
    """Return the values of the DeepSpeed file that the options of the run set.

    Args:
        config: Options of the run.

    Returns:
        {dotted DeepSpeed key: value}.
    """
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16.enabled": config.model.precision == "bf16",
    }


def differs(place: str, key: str, theirs: object, ours: object) -> str:
    """Return the message for a number that the file and the run set differently.

    Args:
        place: Name of the file, with which the message begins.
        key: Dotted path of the key in the file.
        theirs: Value in the file.
        ours: Value of the run.
    """
    own: object = json.dumps(ours)
    if key == "bf16.enabled":
        own = "bf16" if ours else "fp32"
    return (
        f"{place}: {key} is {json.dumps(theirs)}, but {OWNED[key]} of the run is {own}. Write "
        '"auto" in the file'
    )


def load(source: str | EngineDict) -> tuple[EngineDict, str]:
    """Return the content of a DeepSpeed file, and its name for messages.

    Args:
        source: Path of the JSON file, or its name in ds_configs/, or its content, which is
            returned as it is.

    Returns:
        (content, name). The name is the path of the file, or "the DeepSpeed configuration" if
            ``source`` is not a path.

    Raises:
        ConfigError: The file cannot be read.
    """
    if not isinstance(source, str):
        return source, "the DeepSpeed configuration"
    problems: list[str] = []
    engine = read_engine_file(source, problems)
    raise_if(problems)
    assert engine is not None, "raise_if has raised for an unreadable file"
    return engine, ENGINE.find(source)


def value_at(engine: Mapping[str, Any], dotted: str) -> Any:
    """Return the value at a dotted path in nested dicts, or None if a key is missing.

    Args:
        engine: Content of a DeepSpeed file.
        dotted: Path such as "zero_optimization.offload_param.device".
    """
    value: Any = engine
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def set_at(engine: EngineDict, dotted: str, value: object) -> None:
    """Set the value at a dotted path in nested dicts, in place; missing dicts are created.

    Args:
        engine: Content of a DeepSpeed file, which is changed.
        dotted: Path such as "bf16.enabled".
        value: New value.
    """
    *way, last = dotted.split(".")
    for key in way:
        engine = engine.setdefault(key, {})
    engine[last] = value
