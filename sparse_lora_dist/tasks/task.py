"""What a model can be trained to do: all in which one task differs from another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import Keys
from sparse_lora_dist.config.config import DataConfig
from sparse_lora_dist.data import Collate, Documents, labelled_batch, load_documents, packed_batch
from sparse_lora_dist.tasks import seq_cls as classification
from sparse_lora_dist.tasks.class_head import Head, find_head
from sparse_lora_dist.training.step import batch_loss, batch_tally, loss_per_target
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


def read_documents(
    source: str, tokenizer: Any, architecture: PretrainedConfig, data: DataConfig, **options: Any
) -> Documents:
    """Texts, pairs or chats, by the columns that are there."""
    return load_documents(
        source,
        tokenizer,
        text_field=data.text_field,
        prompt_field=data.prompt_field,
        response_field=data.response_field,
        chat_template=data.chat_template,
        train_on=data.train_on,
        **options,
    )


TASKS = {
    "causal_lm": Task(
        settle=lambda architecture, data: None,
        head=lambda model, files, keys_of: Head(),
        read=read_documents,
        collate=packed_batch,
        loss=batch_loss,
        tally=batch_tally,
        scores=loss_per_target,
        target="token",
        peft_type="CAUSAL_LM",
    ),
    "seq_cls": Task(
        settle=classification.settle_classes,
        head=find_head,
        read=classification.read_labelled,
        collate=labelled_batch,
        loss=classification.class_loss,
        tally=classification.class_tally,
        scores=classification.class_scores,
        target="example",
        peft_type="SEQ_CLS",
    ),
}
"""By the name that ``--task`` takes."""
