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
    """A task that a model is trained for: functions for data, head, loss and held-out scores.

    Held-out scores are measured on data that the model does not train on.
    """

    settle: Callable[[PretrainedConfig, DataConfig], None]
    """Function (config of the transformers model, data options) -> None. Called before the model is
    built. Writes what depends on the data, such as a classifier's classes, into the config. Not a
    collective."""
    head: Callable[[PreTrainedModel, CheckpointFiles, Keys], Head]
    """Function (model, base files, parameter name -> names of its tensors in the files) -> head of
    the model. The head's modules train in full even if ``--modules_to_save`` does not name them.
    Not a collective."""
    read: Callable[..., Documents]
    """Function (file, folder or hub id of the data, tokenizer, config of the transformers model,
    data options, further keyword arguments) -> tokenised examples."""
    other_options: tuple[str, ...] = ()
    """Names of data options that ``read`` ignores. Those that the user gave are named."""
    collate: Collate
    """Function that builds a micro-batch from rows, i.e. from training sequences."""
    loss: Callable[[Engine, Any], Tensor]
    """Function (engine, micro-batch) -> loss for training: the sum over the micro-batch's targets
    (tokens or examples that have a loss), in nats, scalar. Collective."""
    tally: Callable[[Engine, Any], Tensor]
    """Function (engine, micro-batch of held-out data) -> sums over the micro-batch that ``scores``
    needs, float64, 1-D, of the same length for every micro-batch. Collective."""
    scores: Callable[[Tensor], dict[str, float]]
    """Function (sum of the results of ``tally`` for all micro-batches on all ranks) -> held-out
    scores. Keys are those of metrics.jsonl, "held_out_loss" first."""
    trains_head: bool
    """True: the model's modules outside ``model.base_model`` are a head that trains in full."""
    target: str
    """Word for what the loss is averaged over, for messages: "token" or "example"."""
    peft_type: str
    """Value of task_type in PEFT's adapter_config.json, e.g. "CAUSAL_LM"."""
    auto_class: str
    """Name of the transformers class that loads a model for the task."""
