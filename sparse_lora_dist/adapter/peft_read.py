"""Read a PEFT LoRA adapter from disk, as initial values of a run (``--init_adapter``)."""

import re
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_lora_dist.adapter.peft_agrees import disagreements, ranks_of
from sparse_lora_dist.adapter.peft_classes import (
    ClassRows,
    by_class_names,
    class_names,
    other_classes,
)
from sparse_lora_dist.adapter.peft_config import (
    APART,
    CONFIG,
    LABELS,
    PREFIX,
    WEIGHTS,
    other_kind,
)
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.small_files import parse_json, refuse_pipes_in, refuse_pointers_in
from sparse_lora_dist.zero3.slices import Values

WRAPPED = re.compile(
    r"module\.|(?:.*\.)?_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."
)
"""Beginning of a parameter's name in a model that something is wrapped around."""
NO_CLASSES = ClassRows(names=(), parameters=())
"""The classes of a run that trains no classifier."""


def read_peft(
    folder: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    alpha: float,
    our_name: Callable[[str], str] = str,
    task_type: str = "CAUSAL_LM",
    classes: ClassRows = NO_CLASSES,
) -> dict[str, Values]:
    """Open a PEFT LoRA adapter, and check that it fits the run. Not a collective.

    Tensors are read later, when the returned functions are called.

    Args:
        folder: adapter folder, or hub id, which is downloaded.
        shapes: tensor name -> shape, for every tensor that the run trains. For each adapted linear,
            "site.lora_a" has shape [rank, in_features] and "site.lora_b" [out_features, rank],
            where "site" is the linear's name in the base. A parameter of a module trained in full
            has its own name, such as "score.weight"; it may be missing in the adapter.
        rank: rank of the run, which must be the adapter's.
        alpha: LoRA alpha of the run, which must be the adapter's.
        our_name: function that returns the name of a tensor in ``shapes``, given the adapter's
            name of it, which may be that of another class (``Model.our_name``).
        task_type: PEFT's name of the run's task, e.g. "SEQ_CLS".
        classes: classes of a run that trains a classifier. Rows of the adapter's head are put into
            their order, by name.

    Returns:
        Tensor name, as in ``shapes`` -> function that reads a range of the tensor from disk, for
        every tensor of the adapter.

    Raises:
        UserError: the adapter is absent or damaged, or its type, rank, alpha, classes, modules or
            shapes are not those of the run.
    """
    config, values, theirs = open_peft(folder)
    apart = [] if other_kind(config) else _apart_from_its_config(config, theirs)
    values = {our_name(name): read for name, read in values.items()}
    theirs = {our_name(name): shape for name, shape in theirs.items()}
    problems = []
    if kind := other_kind(config) or (config.get("use_rslora") and "use_rslora"):
        problems.append(f"It has {kind}, so it is not a plain LoRA adapter. Give a plain one.")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problems.append(
            "Its modules have different ranks or alphas (rank_pattern, alpha_pattern), but a run "
            "starts with one rank and one alpha for all. Give an adapter that has that."
        )
    if config.get("r") != rank:
        problems.append(
            f"Its rank is {config.get('r')}, but --rank is {rank}. Give "
            "the adapter's rank as --rank."
        )
    if config.get("lora_alpha") != alpha:
        problems.append(
            f"Its alpha is {config.get('lora_alpha')}, but --alpha is {alpha}. Use the adapter's "
            "alpha."
        )
    named = class_names(local_folder(folder)) if classes.names else []
    # A problem of the former would only show up again in every tensor.
    problems = problems or apart or other_classes(named, theirs, classes)
    problems = problems or _mismatches(theirs, shapes, _other_task(config, task_type))
    if problems:
        raise UserError(f"--init_adapter {folder} does not fit this run. " + " ".join(problems))
    return by_class_names(folder, named, values, classes, theirs)


def open_peft(
    folder: str, flag: str = "--init_adapter"
) -> tuple[dict[str, Any], dict[str, Values], dict[str, tuple[int, ...]]]:
    """Open the files of a PEFT adapter without reading their tensors. Not a collective.

    Args:
        folder: adapter folder, or hub id, which is downloaded.
        flag: the command-line option that gave ``folder``, for error messages.

    Returns:
        A tuple of three: the contents of adapter_config.json; tensor name -> function that reads a
        range of the tensor from disk; tensor name -> shape. Names are "site.lora_a" and
        "site.lora_b", where "site" is the linear's name in the base. A parameter of a module
        trained in full has its own name, such as "score.weight".

    Raises:
        UserError: the adapter is absent or damaged.
    """
    config, files = _open_files(folder, flag)
    _refuse_bare_names(folder, flag, files[0].keys())
    saved = {_our_name(key): file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118  safe_open is no dict
    wrapped = next((name for name in saved if WRAPPED.match(name)), None)
    if wrapped is not None:
        raise UserError(
            f"{flag} {folder} was saved from a wrapped model (torch.compile, DDP, FSDP or "
            f"activation checkpointing): it holds {wrapped}. Save it again from the unwrapped "
            "model, or take these parts out of its names."
        )
    kept = next((name for name in saved if ".base_layer." in name), None)
    if kept is not None and other_kind(config) is None:
        raise UserError(
            f"{flag} {folder} holds {kept}, a weight of the base that PEFT saves beside an adapter "
            "of an output head or embedding. If it is the base's own, save the adapter without it: "
            "save_pretrained(..., save_embedding_layers=False)."
        )
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in saved.items()}
    values = {name: _range_of(tensor, shapes[name]) for name, tensor in saved.items()}
    return config, values, shapes


def _refuse_bare_names(folder: str, flag: str, keys: Iterable[str]) -> None:
    if bare := [key for key in keys if not key.startswith(PREFIX)]:
        raise UserError(
            f"{flag} {folder} holds {bare[0]}, without the prefix {PREFIX} of PEFT's names, and "
            "PEFT drops such tensors. Save the adapter with PEFT's save_pretrained, or put the "
            "prefix before each name."
        )


def _range_of(tensor: Any, shape: tuple[int, ...]) -> Values:
    # Reads only the rows that hold the range.
    columns = prod(shape[1:])

    def values(start: int, stop: int) -> Tensor:
        first_row, last_row = start // columns, -(-stop // columns)
        rows: Tensor = tensor[first_row:last_row].flatten()
        return rows[start - first_row * columns : stop - first_row * columns]

    return values


def _apart_from_its_config(
    config: Mapping[str, Any], theirs: Mapping[str, tuple[int, ...]]
) -> list[str]:
    full = [name for name in theirs if not name.endswith((".lora_a", ".lora_b"))]
    if said := disagreements(config, ranks_of(theirs), full):
        return [
            f"Its tensors and its {CONFIG} disagree: {'; '.join(said)}. Export or save the adapter "
            "again, or correct this file."
        ]
    return []


def _other_task(config: Mapping[str, Any], task_type: str) -> str:
    """Return PEFT's name of the task of an adapter with a head, such as a classifier's, if it is
    not the run's; "" otherwise."""
    theirs = str(config.get("task_type") or task_type)
    return theirs if theirs not in ("CAUSAL_LM", task_type) else ""


def _mismatches(
    theirs: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], other_task: str
) -> list[str]:
    if other := sorted(_sites(theirs) ^ _sites(shapes)):
        return [
            f"It and --target_modules differ in {len(other)} modules, which only one of them has "
            f"(the first is {other[0]}). Set --target_modules to the adapter's modules."
        ]
    extra = sorted(theirs.keys() - shapes.keys())
    if stray := [name for name in extra if ".lora_" in name]:
        return [
            f"It holds the tensor {stray[0]}, which is neither A nor B of a plain LoRA, so it "
            "would be lost. Save the adapter again without it, or give another."
        ]
    if extra and other_task:
        return [
            f"Its task differs from the run's: it is {other_task} (task_type in {CONFIG}), and it "
            f"trained {extra[0]}, which this run does not. Set --task seq_cls for an adapter of a "
            "classifier, or give an adapter of a causal language model."
        ]
    if extra:
        return [
            f"It trained {extra[0]} in full. Name that module in --modules_to_save. If this model "
            "has no such module, the adapter is of another task or model: give another."
        ]
    halves = (f"{site}.{half}" for site in _sites(shapes) for half in ("lora_a", "lora_b"))
    if absent := sorted(name for name in halves if name in shapes and name not in theirs):
        return [f"It has no {absent[0]}, so that module's update would be lost. Export it again."]
    return [
        f"Its {name} has shape {list(shape)}, but this model needs {list(shapes[name])}. Give an "
        "adapter that was trained on this model."
        for name, shape in theirs.items()
        if shape != tuple(shapes[name])
    ][:1]


def _sites(names: Iterable[str]) -> set[str]:
    return {n.rpartition(".")[0] for n in names if n.endswith((".lora_a", ".lora_b"))}


def local_folder(folder: str, flag: str = "--init_adapter") -> Path:
    """Return the local folder of an adapter, and download its files first if it is a hub id.

    Args:
        folder: adapter folder or hub id.
        flag: the command-line option that gave ``folder``, for error messages.

    Raises:
        UserError: it is neither a folder nor an id from which the hub gives files.
    """
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(folder, allow_patterns=["adapter_*", APART, LABELS]))
    except Exception as error:  # the hub raises a dozen kinds
        raise UserError(
            f"{flag} {folder} is not a folder, and downloading it from the hub failed. Give "
            f"the folder or the hub id of a PEFT adapter. The hub's message: {error}"
        ) from error


def _open_files(folder: str, flag: str) -> tuple[dict[str, Any], list[Any]]:
    """Open an adapter's files, and download them first if ``folder`` is no local folder.

    Args:
        folder: adapter folder or hub id.
        flag: the command-line option that gave ``folder``, for error messages.

    Returns:
        A tuple of two: the contents of adapter_config.json; the opened safetensors files.
    """
    place = local_folder(folder, flag)
    refuse_pipes_in(place)
    refuse_pointers_in(place)
    config, weights, apart = (place / name for name in (CONFIG, WEIGHTS, APART))
    absent = [p.name for p in (config, weights) if not p.exists()]
    if absent:
        raise UserError(
            f"{flag} {folder} has no {' and no '.join(absent)}, so it is not a PEFT adapter. Give "
            "the folder of an adapter that PEFT or this project has saved."
        )
    try:
        # An export with --uniform_rank keeps modules trained in full in a file of their own.
        there = [path for path in (weights, apart) if path.exists()]
        content = parse_json(config.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"{CONFIG} must be a JSON object, got a {type(content).__name__}")
        return content, [safe_open(str(p), framework="pt") for p in there]
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{flag} {folder} is damaged: {error}. Copy or export the adapter again."
        ) from error


def _our_name(key: str) -> str:
    name = key.removeprefix(PREFIX)
    for theirs, ours in (("lora_A.weight", "lora_a"), ("lora_B.weight", "lora_b")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
