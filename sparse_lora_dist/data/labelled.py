"""Labelled examples -> documents of one class each -> batches, a row an example.

Shapes: M rows of a micro-batch, T tokens of its longest row (padded).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.batches import FILLER, padded, padded_length
from sparse_lora_dist.data.fields import ExampleError, text_of
from sparse_lora_dist.data.labels import check_columns, label_of
from sparse_lora_dist.data.packing import Rows
from sparse_lora_dist.data.read_files import Columns, read_examples
from sparse_lora_dist.data.tokens import (
    CACHE_VERSION,
    FEATURES,
    NOT_A_TARGET,
    Document,
    Documents,
    Ints,
    identity,
    tokenise,
)
from sparse_lora_dist.errors import UserError

LABELLED = datasets.Features(
    {
        **FEATURES,
        "segment_ids": datasets.List(datasets.Value("int8")),
        "whole_length": datasets.Value("int64"),
    }
)
"""What the cache keeps of each example; its one label is a class."""


@dataclass(frozen=True, kw_only=True)
class LabelledDocument(Document):
    """One example. ``labels`` holds its class alone."""

    segment_ids: Ints
    """0 in the first text, 1 in the second, where the model tells them apart; else empty."""


class LabelledDocuments(Documents):
    """The examples of a data set; those that were too long are cut, not left out."""

    def __init__(
        self, table: datasets.Dataset, *, sequence_length: int, classes: Sequence[str]
    ) -> None:
        super().__init__(table, sequence_length=sequence_length)
        self._table = table.with_format("numpy", columns=["input_ids", "labels", "segment_ids"])
        self.classes = classes
        whole_length = table.with_format("numpy")["whole_length"][:][self._kept]
        self.num_cut = int((whole_length > sequence_length).sum())
        self.longest = int(whole_length.max(initial=0))

    def __getitem__(self, index: int) -> LabelledDocument:
        record = self._table[int(self._kept[index])]
        return LabelledDocument(**{k: v.astype(np.int64) for k, v in record.items()})

    def report(self) -> str:
        """One line: how many examples of each class there are, what was cut or left out."""
        labels = self._table["labels"][:][self._kept].flatten()
        counts = Counter(self.classes[label] for label in labels.tolist())
        each = ", ".join(f"{counts[name]:,} of {name}" for name in self.classes[:5])
        more = ", ..." if len(self.classes) > 5 else ""
        parts = [f"{len(self):,} examples ({each}{more}), {self.num_tokens:,} tokens"]
        if self.num_cut:
            parts.append(
                f"{self.num_cut:,} cut to --sequence_length {self.sequence_length} "
                f"(raise it to {self.longest:,} to keep all)"
            )
        if self.no_target:
            parts.append(f"{self.no_target:,} left out, without text")
        return "; ".join(parts)


def load_labelled(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    text_fields: Sequence[str],
    label_field: str,
    column_names: Columns,
    classes: Sequence[str],
    segments: bool,
    sequence_length: int,
    max_samples: int | None,
    flag: str = "--data",
    split: str = "train",
) -> LabelledDocuments:
    """Read, check and tokenise ``source`` as the tokenizer itself frames a text, or a pair.

    Args:
        text_fields: the column of the text, and of the second where pairs are labelled.
        classes: the names of the classes; an example's class is the place of its label in them.
        segments: does the model tell the texts of a pair apart by token_type_ids?

    Raises:
        UserError: the source or an example is wrong, a label is no class, or nothing is left.
    """
    examples = read_examples(
        source, split=split, max_samples=max_samples, flag=flag, column_names=column_names
    )
    columns = (*text_fields, label_field)
    check_columns(examples.table.column_names, columns, f"{flag} {source}")
    feature = examples.table.features[label_field]
    places = {name: place for place, name in enumerate(classes)}

    def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
        label = label_of(record[label_field], feature)
        if label not in places:
            raise ExampleError(f"label {label!r} is none of the classes: {', '.join(classes)}")
        texts = [text_of(record[c], repr(c)) for c in text_fields]
        return [_row(tokenizer, texts, places[label], segments, sequence_length)]

    key = (CACHE_VERSION, "labelled", columns, tuple(classes), segments, sequence_length)
    table = tokenise(examples, columns, rows_of, (*key, *identity(tokenizer)), LABELLED)
    documents = LabelledDocuments(table, sequence_length=sequence_length, classes=classes)
    if len(documents) == 0:
        raise UserError(f"{flag} {source}: nothing is left to train on: {documents.report()}")
    return documents


def _row(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    place: int,
    segments: bool,
    sequence_length: int,
) -> dict[str, Any]:
    # verbose=False: what is longer than the model's window is cut, so no warning is due.
    whole = tokenizer(*texts, return_token_type_ids=True, verbose=False)
    length, cut = len(whole.input_ids), whole
    if length > sequence_length:  # only the tokenizer knows which tokens frame the texts
        cut = tokenizer(
            *texts, return_token_type_ids=True, truncation=True, max_length=sequence_length
        )
        tokenizer.backend_tokenizer.no_truncation()  # it would be part of its identity
    has_text = all(text.strip() for text in texts)
    return {
        "input_ids": cut.input_ids,
        "segment_ids": cut.token_type_ids if segments else [],
        "labels": [place],
        "length": len(cut.input_ids),
        "whole_length": length,
        "num_targets": int(has_text),
    }


@dataclass(frozen=True, kw_only=True)
class LabelledBatch:
    """One micro-batch of one rank, int64."""

    input_ids_MT: Tensor
    attention_mask_MT: Tensor
    """1 for the tokens of an example, 0 for padding."""
    segment_ids_MT: Tensor | None
    """None where the model knows of none."""
    labels_M: Tensor
    """Class of each row; -100 for filler rows."""
    rows_M: tuple[int, ...]
    """Row numbers in the stream; -1 for filler rows."""
    lengths_M: tuple[int, ...]
    """Tokens of each row, at its front: 0 for filler, padding not counted."""

    @property
    def num_targets(self) -> int:
        """Examples the loss is taken on."""
        return int((self.labels_M != NOT_A_TARGET).sum())

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """What the model is called with, by its names."""
        inputs = {"input_ids": self.input_ids_MT, "attention_mask": self.attention_mask_MT}
        if self.segment_ids_MT is not None:
            inputs["token_type_ids"] = self.segment_ids_MT
        return {name: t.to(device) for name, t in inputs.items()}


def labelled_batch(
    rows: Rows, numbers: tuple[int, ...], *, pad_id: int, shuffle: bool
) -> LabelledBatch:
    """The rows of these numbers of the stream, an example each. A filler row is one pad token,
    attended to: a softmax over nothing at all would be no number."""
    filler = LabelledDocument(
        input_ids=np.array([pad_id]),
        labels=np.array([NOT_A_TARGET]),
        segment_ids=np.array([], dtype=np.int64),
    )

    def example(number: int) -> LabelledDocument:
        (place,) = rows.document_numbers(rows.index(number, shuffle=shuffle))
        return cast(LabelledDocument, rows.documents[place])

    parts = [filler if n == FILLER else example(n) for n in numbers]
    length = padded_length([len(d.input_ids) for d in parts], rows.sequence_length)
    segments = [d.segment_ids for d in parts]
    return LabelledBatch(
        input_ids_MT=padded([d.input_ids for d in parts], length, pad_id),
        attention_mask_MT=padded([np.ones_like(d.input_ids) for d in parts], length, 0),
        segment_ids_MT=padded(segments, length, 0) if any(len(s) for s in segments) else None,
        labels_M=torch.from_numpy(np.concatenate([d.labels for d in parts])),
        rows_M=numbers,
        lengths_M=tuple(0 if d is filler else len(d.input_ids) for d in parts),
    )
