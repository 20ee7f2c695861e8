"""Task causal_lm: train a model to predict the next token. Defines its loss and held-out score.

Shapes: M rows of a micro-batch, T tokens of a row, which may hold several packed documents.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import NOT_A_TARGET, Batch, Documents, load_documents, packed_batch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.device import moved
from sparse_lora_dist.tasks.class_head import Head
from sparse_lora_dist.tasks.loss_head import summed_loss
from sparse_lora_dist.tasks.packed_attention import packed
from sparse_lora_dist.tasks.task import Task
from sparse_lora_dist.zero3.engine import Engine


def batch_loss(engine: Engine, batch: Batch) -> Tensor:
    """Return the sum of -log p(token) over a micro-batch's target tokens. Collective.

    Target tokens are those that have a loss.

    Args:
        engine: engine that runs the model.
        batch: micro-batch of packed rows, on the CPU.

    Returns:
        Loss in nats, fp32 scalar on the device.
    """
    # Logits at position t predict token t + 1. Shift the labels, which are smaller than the logits.
    next_labels_MT = F.pad(batch.labels_MT[:, 1:], (0, 1), value=NOT_A_TARGET)
    # Held-out losses, whose forward has no gradient, are computed with transformers' attention.
    training = torch.is_grad_enabled()
    with packed(batch.position_ids_MT, comm.device()) if training else nullcontext():
        ids_MT, positions_MT = moved(comm.device(), batch.input_ids_MT, batch.position_ids_MT)
        # Positions that restart at 0 mark the documents of a row. transformers reads them so only
        # without an attention mask and without a cache.
        return summed_loss(
            engine,
            next_labels_MT,
            input_ids=ids_MT,
            position_ids=positions_MT,
            use_cache=False,
        )


def batch_tally(engine: Engine, batch: Batch) -> Tensor:
    """Return loss and number of target tokens of a micro-batch. Collective.

    Args:
        engine: engine that runs the model.
        batch: micro-batch of packed rows, on the CPU.

    Returns:
        float64 [2] on the device: the sum of -log p(token) over the target tokens, which are those
        that have a loss, in nats; the number of these tokens.
    """
    loss = batch_loss(engine, batch)
    return torch.stack([loss.double(), loss.new_tensor(batch.num_targets, dtype=torch.float64)])


def loss_per_target(totals: Tensor) -> dict[str, float]:
    """Compute the held-out loss from sums over all micro-batches.

    Args:
        totals: sum of what ``batch_tally`` returned for all micro-batches on all ranks, float64
            [2].

    Returns:
        Dict with the key "held_out_loss": mean loss in nats per target token.
    """
    loss, targets = totals
    return {"held_out_loss": float(loss / targets.clamp(min=1.0))}


def read_documents(
    source: str, tokenizer: Any, architecture: PretrainedConfig, data: DataConfig, **options: Any
) -> Documents:
    """Read and tokenise texts, prompt and response pairs, or chats.

    The columns of the source decide which of these three kinds it contains.

    Args:
        source: file, folder or hub id of the data.
        tokenizer: tokenizer of the base.
        architecture: config of the transformers model. Unused here; other tasks need it.
        data: data options: names of columns, chat template, tokens to train on.
        options: further arguments of ``load_documents``.

    Returns:
        Documents with token ids and labels: one for each pair or chat, and one or more for each
        text, since long texts are split. Pairs and chats that are too long or have no target token
        are left out.
    """
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
    other_options=("label_field",),
    collate=packed_batch,
    loss=batch_loss,
    tally=batch_tally,
    scores=loss_per_target,
    trains_head=False,
    target="token",
    peft_type="CAUSAL_LM",
    auto_class="AutoModelForCausalLM",
)
