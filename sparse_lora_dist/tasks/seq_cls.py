"""Task seq_cls: train a model to predict the class of an example. Defines classes, loss and scores.

Shapes: M rows of a micro-batch, each with one example; C classes.
"""

from math import isqrt, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from sparse_lora_dist.config.paths import resolve_default
from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import (
    NOT_A_TARGET,
    Documents,
    LabelledBatch,
    class_names,
    labelled_batch,
    load_labelled,
    names_beside_numbers,
    read_classes,
)
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.tasks.class_head import ONE_LABEL, classes_of, find_head
from sparse_lora_dist.tasks.task import Task
from sparse_lora_dist.zero3.engine import Engine


def settle_classes(architecture: PretrainedConfig, data: DataConfig) -> None:
    """Write the classes of --data into the model's config, which sets the width of its head.

    Must be called before the model is built. Not a collective.

    Args:
        architecture: config of the transformers model. Its id2label, label2id, problem_type and
            use_cache are changed.
        data: data options: the data set and its column of labels.
    """
    labels = read_classes(
        resolve_default("data", data.data),
        label_field=data.label_field,
        column_names=data.column_names,
        flag="--data",
    )
    if others := names_beside_numbers(labels):
        print_line(
            "note",
            f"the labels are whole numbers and names. If {', '.join(map(repr, others[:6]))} is no "
            "class, remove its examples",
        )
    names = class_names(labels, classes_of(architecture))
    architecture.id2label = dict(enumerate(names))
    architecture.label2id = {name: place for place, name in enumerate(names)}
    before = getattr(architecture, "problem_type", None)
    if before not in (None, ONE_LABEL):
        print_line(
            "note",
            f"config.json of the base has problem_type {before}. It is trained with one label an "
            f"example, by cross-entropy; a merged model says {ONE_LABEL}, and with the adapter "
            "alone set problem_type so yourself",
        )
    architecture.problem_type = ONE_LABEL
    architecture.use_cache = False  # a decoder would keep keys and values to generate from


def read_labelled(
    source: str, tokenizer: Any, architecture: PretrainedConfig, data: DataConfig, **options: Any
) -> Documents:
    """Read and tokenise labelled examples.

    Args:
        source: file, folder or hub id of the data.
        tokenizer: tokenizer of the base.
        architecture: config of the transformers model. A label becomes its index among the
            config's class names.
        data: data options: names of columns.
        options: further arguments of ``load_labelled``.

    Returns:
        One document for each example, with its token ids and label. Long examples are cut, and
        those without text are left out.
    """
    pair = () if data.text_pair_field is None else (data.text_pair_field,)
    # RoBERTa has type_vocab_size 1, and its tokenizer gives both texts of a pair one type. Others
    # give none, as whoever uses the classifier with this tokenizer will see.
    has_types = getattr(architecture, "type_vocab_size", 0) > 1
    return load_labelled(
        source,
        tokenizer,
        text_fields=(data.text_field, *pair),
        label_field=data.label_field,
        classes=classes_of(architecture),
        segments=has_types and "token_type_ids" in tokenizer.model_input_names,
        end=architecture.eos_token_id if architecture.is_encoder_decoder else None,
        **options,
    )


def class_loss(engine: Engine, batch: LabelledBatch) -> Tensor:
    """Return the sum of -log p(class) over a micro-batch's examples. Collective.

    Args:
        engine: engine that runs the model.
        batch: micro-batch of labelled examples, on the CPU.

    Returns:
        Loss in nats, fp32 scalar on the device.
    """
    return _summed_loss(engine(**batch.inputs(comm.device())).logits, batch)


def class_tally(engine: Engine, batch: LabelledBatch) -> Tensor:
    """Return loss and confusion matrix of a micro-batch. Collective.

    Args:
        engine: engine that runs the model.
        batch: micro-batch of labelled examples, on the CPU.

    Returns:
        float64 [1 + C * C] on the device, for C classes: the sum of -log p(class) in nats, then the
        flattened confusion matrix. Entry [i, j] of the matrix is the number of examples of class i
        that were predicted as class j.
    """
    logits_MC = engine(**batch.inputs(comm.device())).logits
    num_classes = logits_MC.shape[-1]
    is_example = batch.labels_M != NOT_A_TARGET
    pairs = batch.labels_M * num_classes + logits_MC.argmax(-1).cpu()
    confusion = torch.bincount(pairs[is_example], minlength=num_classes**2)
    loss = _summed_loss(logits_MC, batch).reshape(1)
    return torch.cat([loss.double(), confusion.to(comm.device(), torch.float64)])


def class_scores(totals: Tensor) -> dict[str, float]:
    """Compute held-out loss, accuracy and Matthews correlation from sums over all micro-batches.

    Counts of examples add up exactly, so accuracy and correlation depend neither on the number of
    ranks nor on the micro-batch size. The Matthews correlation is that of labels and predictions.
    It is 0 if all labels or all predictions are of one class. For more than two classes it is
    Gorodkin's R_K (2004, doi:10.1016/j.compbiolchem.2004.09.006).

    Args:
        totals: sum of what ``class_tally`` returned for all micro-batches on all ranks, float64
            [1 + C * C] for C classes.

    Returns:
        Dict with the keys "held_out_loss" (nats per example), "held_out_accuracy" (in [0, 1]) and
        "held_out_matthews" (in [-1, 1]).
    """
    loss, counts = float(totals[0]), totals[1:].cpu()
    confusion_CC = counts.view(isqrt(len(counts)), -1)
    n, right = float(counts.sum()), float(confusion_CC.trace())
    true_C, said_C = confusion_CC.sum(1), confusion_CC.sum(0)
    spread = sqrt((n**2 - float(true_C @ true_C)) * (n**2 - float(said_C @ said_C)))
    return {
        "held_out_loss": loss / n,
        "held_out_accuracy": right / n,
        "held_out_matthews": (right * n - float(true_C @ said_C)) / spread if spread else 0.0,
    }


def _summed_loss(logits_MC: Tensor, batch: LabelledBatch) -> Tensor:
    labels_M = batch.labels_M.to(logits_MC.device)
    return F.cross_entropy(logits_MC.float(), labels_M, ignore_index=NOT_A_TARGET, reduction="sum")


SEQ_CLS = Task(
    settle=settle_classes,
    head=find_head,
    read=read_labelled,
    other_options=("prompt_field", "response_field", "chat_template", "train_on"),
    collate=labelled_batch,
    loss=class_loss,
    tally=class_tally,
    scores=class_scores,
    trains_head=True,
    target="example",
    peft_type="SEQ_CLS",
    auto_class="AutoModelForSequenceClassification",
)
