"""The ``Task`` record, which holds everything that differs between tasks."""

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
    """A task that a model is trained for: functions for data, head, loss and held-out scores."""

    settle: Callable[[PretrainedConfig, DataConfig], None]
    """(model's config, data options) -> None. Writes what depends on the data, such as a
    classifier's classes, into the model's config. Not a collective."""
    head: Callable[[PreTrainedModel, CheckpointFiles, Keys], Head]
    """(model, base files, parameter name -> names of its tensors in the files) -> head. Its
    modules train in full without ``--modules_to_save``."""
    read: Callable[..., Documents]
    """(source, tokenizer, model's config, data options, ...) -> tokenised examples."""
    collate: Collate
    """Builds a micro-batch from rows."""
    loss: Callable[[Engine, Any], Tensor]
    """(engine, micro-batch) -> sum of the losses over the micro-batch's targets, scalar.
    Collective."""
    tally: Callable[[Engine, Any], Tensor]
    """(engine, micro-batch) -> sums over the micro-batch that ``scores`` needs, float64, 1-D, of
    the same length for every micro-batch. Collective."""
    scores: Callable[[Tensor], dict[str, float]]
    """Sum of the results of ``tally`` for all micro-batches -> held-out scores. Keys are those of
    metrics.jsonl, "held_out_loss" first."""
    trains_head: bool
    """True: the modules outside the base model are a head that trains in full."""
    target: str
    """Word for what the loss is averaged over, for messages: "token" or "example"."""
    peft_type: str
    """Value of task_type in PEFT's adapter_config.json, e.g. "CAUSAL_LM"."""
    auto_class: str
    """Name of the transformers class that loads a model for the task."""
