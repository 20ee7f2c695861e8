"""What a model can be trained to do: all in which one task differs from another."""

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
    """One task, from the model's config to the words for its loss."""

    settle: Callable[[PretrainedConfig, DataConfig], None]
    """Writes into the model's config what the data decide. No collectives."""
    head: Callable[[PreTrainedModel, CheckpointFiles, Keys], Head]
    """What trains in full without being named."""
    read: Callable[..., Documents]
    """(source, tokenizer, the model's config, data options, ...) -> tokenised examples."""
    collate: Collate
    loss: Callable[[Engine, Any], Tensor]
    """Sum of the losses over a micro-batch's targets."""
    tally: Callable[[Engine, Any], Tensor]
    """A vector of float64 sums over a micro-batch, the same in length for all."""
    scores: Callable[[Tensor], dict[str, float]]
    """Sum of all tallies -> what metrics.jsonl says, "held_out_loss" first."""
    target: str
    """What the loss is a mean over."""
    peft_type: str
    """PEFT's name of the task."""
