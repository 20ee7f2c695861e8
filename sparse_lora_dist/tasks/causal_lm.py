"""Task causal_lm: the next token. Its loss, and what held-out rows are scored by.

Shapes: M rows of a micro-batch, T tokens of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import NOT_A_TARGET, Batch, Documents, load_documents, packed_batch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.tasks.class_head import Head
from sparse_lora_dist.tasks.loss_head import summed_loss
from sparse_lora_dist.tasks.task import Task
from sparse_lora_dist.zero3.engine import Engine


def batch_loss(engine: Engine, batch: Batch) -> Tensor:
    """Sum of -log p over the batch's target tokens. Collective."""
    # Labels move left instead of logits.
    next_labels_MT = F.pad(batch.labels_MT[:, 1:], (0, 1), value=NOT_A_TARGET)
    batch = batch.to(comm.device())
    # Documents are told apart by positions that restart; transformers reads them so only without an
    # attention mask and without a cache.
    return summed_loss(
        engine,
        next_labels_MT,
        input_ids=batch.input_ids_MT,
        position_ids=batch.position_ids_MT,
        use_cache=False,
    )


def batch_tally(engine: Engine, batch: Batch) -> Tensor:
    """[sum of -log p, target tokens] of a micro-batch, float64. Collective."""
    loss = batch_loss(engine, batch)
    return torch.stack([loss.double(), loss.new_tensor(batch.num_targets, dtype=torch.float64)])


def loss_per_target(totals: Tensor) -> dict[str, float]:
    """From the sum of all tallies: nats per target token."""
    loss, targets = totals
    return {"held_out_loss": float(loss / targets.clamp(min=1.0))}


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


CAUSAL_LM = Task(
    settle=lambda architecture, data: None,
    head=lambda model, files, keys_of: Head(),
    read=read_documents,
    collate=packed_batch,
    loss=batch_loss,
    tally=batch_tally,
    scores=loss_per_target,
    target="token",
    peft_type="CAUSAL_LM",
)
