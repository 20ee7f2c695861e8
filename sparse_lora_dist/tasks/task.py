"""The ``Task`` record: everything in which one task differs from another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import Keys
from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import Collate, Documents
from sparse_lora_dist.tasks.class_head import Head
from sparse_lora_dist.zero3.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a model is trained to do: how data are read, the loss, and held-out scores."""

    settle: Callable[[PretrainedConfig, DataConfig], None]
    """(model's config, data options): writes what the data decide, like a classifier's classes,
    into the model's config. Not a collective."""
    head: Callable[[PreTrainedModel, CheckpointFiles, Keys], Head]
    """(model, base files, keys of each parameter in them) -> modules that train in full without
    ``--modules_to_save``."""
    read: Callable[..., Documents]
    """(source, tokenizer, model's config, data options, ...) -> tokenised examples."""
    collate: Collate
    """Makes a micro-batch of rows."""
    loss: Callable[[Engine, Any], Tensor]
    """(engine, micro-batch) -> sum of the losses over the micro-batch's targets, scalar.
    Collective."""
    tally: Callable[[Engine, Any], Tensor]
    """(engine, micro-batch) -> sums over the micro-batch that ``scores`` needs, float64, 1-D, of
    the same length for every micro-batch. Collective."""
    scores: Callable[[Tensor], dict[str, float]]
    """Sum of all tallies -> held-out scores by key of metrics.jsonl, "held_out_loss" first."""
    trains_head: bool
    """Whether the modules beside the base model are a head that trains in full."""
    target: str
    """What the loss is averaged over, as a word for messages: "token" or "example"."""
    peft_type: str
    """PEFT's name of the task."""
    auto_class: str
    """Name of the transformers class that loads a model for the task."""
