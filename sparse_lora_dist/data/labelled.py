"""Read and tokenise labelled examples for classification, and make batches with one example per
row.

Suffixes of names are shapes: M is the number of rows of a micro-batch, T the number of tokens of
its longest row after padding.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.batches import FILLER, Rows, padded, padded_length
from sparse_lora_dist.data.fields import ExampleError, text_of
from sparse_lora_dist.data.labels import check_columns, label_of
from sparse_lora_dist.data.local_files import Columns
from sparse_lora_dist.data.notes import words_cut
from sparse_lora_dist.data.read_files import read_examples
from sparse_lora_dist.data.reading import describe, shown
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
"""Columns of the cache of tokens, which has one row for each example. ``labels`` holds one number,
the class. ``num_targets`` is 1, or 0 if the example has no text. ``length`` and ``whole_length``
are its numbers of tokens after and before it is cut to ``--sequence_length``."""


UNKNOWN = (
    "the label -1 is a class of its own here. Some data sets mark examples without a label so; "
    "remove these if this is one."
)


@dataclass(frozen=True, kw_only=True)
class LabelledDocument(Document):
    """One tokenised example for classification. Its ``labels`` are int64 [1], the class number."""

    segment_ids: Ints
    """int64 [number of tokens], the token_type_ids of transformers: 0 in the first text of a pair,
    1 in the second. Empty if the model has none."""


class LabelledDocuments(Documents):
    """The tokenised examples of a data set. Examples that are too long are cut, not left out."""

    def __init__(
        self, table: datasets.Dataset, *, sequence_length: int, classes: Sequence[str]
    ) -> None:
        """Make documents of a cached table, without those that have no text.

        Args:
            table: table with the columns ``LABELLED``, one row for each example.
            sequence_length: most tokens of an example, to which longer ones have been cut.
            classes: the label of each class, in the order of the class numbers.
        """
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
        """Return one line of text: the number of examples of each class, and how many were cut or
        left out."""
        labels = self._table["labels"][:][self._kept].flatten()
        counts = Counter(self.classes[label] for label in labels.tolist())
        each = ", ".join(f"label {shown([n])}: {counts[n]:,}" for n in self.classes[:5])
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
    end: int | None = None,
    sequence_length: int,
    max_samples: int | None,
    flag: str = "--data",
    split: str = "train",
) -> LabelledDocuments:
    """Read, check and tokenise labelled examples for classification. Not a collective.

    The tokenizer adds its own special tokens to each text or pair. The token ids are cached on
    disk.

    Args:
        source: file, folder or id of a Hugging Face hub data set; see ``read_examples``.
        tokenizer: tokenizer of the model.
        text_fields: names of the text columns: one, or two if the examples are pairs of texts.
        label_field: name of the column of labels.
        column_names: names of the columns of a table without a header line; () for other data.
        classes: the label of each class, in the order of the class numbers.
        segments: True if the model uses token_type_ids to tell the texts of a pair apart.
        end: id of the token at which the model answers, of which each row must have as many; None
            for models that answer elsewhere.
        sequence_length: most tokens of an example; longer ones are cut.
        max_samples: number of examples to read, from the first on; None reads all.
        flag: the command-line flag whose value is ``source``, for messages.
        split: split of a folder or hub data set, e.g. "train".

    Returns:
        The documents, one for each example that has text, in the order of the data.

    Raises:
        UserError: the source or an example is wrong, a label is not in ``classes``, or no example
            is left.
    """
    examples = read_examples(
        source, split=split, max_samples=max_samples, flag=flag, column_names=column_names
    )
    columns = (*text_fields, label_field)
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(
            f"The options of texts and labels name the column {twice[0]!r} twice. Name one column "
            "for each of --text_field, --text_pair_field and --label_field."
        )
    check_columns(examples.names.columns, columns, f"{flag} {source}")
    feature = examples.feature(label_field)
    num_ends = tokenizer(*["a"] * len(text_fields)).input_ids.count(end)
    places = {name: place for place, name in enumerate(classes)}

    def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
        label = label_of(record.get(label_field), feature)
        if label not in places:
            raise ExampleError(
                f"The label {label!r} is not one of the classes of --data: {', '.join(classes)}. "
                "Correct it, or remove the example."
            )
        texts = [text_of(record.get(c), repr(c)) for c in text_fields]
        row = _row(tokenizer, texts, places[label], segments, sequence_length)
        if end is not None and row["num_targets"] and row["input_ids"].count(end) != num_ends:
            raise ExampleError(
                f"This example has {row['input_ids'].count(end)} tokens "
                f"{tokenizer.convert_ids_to_tokens(end)!r}, but this model answers at the last of "
                f"{num_ends} in each row. Take it out of the text."
            )
        return [row]

    key = (CACHE_VERSION, "labelled with text", columns, tuple(classes), segments, sequence_length)
    table = tokenise(examples, columns, rows_of, (*key, *identity(tokenizer)), LABELLED)
    documents = LabelledDocuments(table, sequence_length=sequence_length, classes=classes)
    if len(documents) == 0:
        raise UserError(
            f"{flag} {source} has no example with text: {documents.report()}. Give data in which "
            "at least one example has text."
        )
    found = (UNKNOWN if "-1" in classes else "", words_cut(examples, text_fields, tokenizer))
    notes = tuple(note for note in found if note)
    unused = {"--column_names": bool(column_names) and not examples.is_table}
    documents.reading = describe(examples, columns, notes=notes).with_unused(unused)
    return documents


def _row(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    place: int,
    segments: bool,
    sequence_length: int,
) -> dict[str, Any]:
    # verbose=False: no warning for a text longer than the model's window, as it is cut below.
    whole = tokenizer(*texts, return_token_type_ids=True, verbose=False)
    length, cut = len(whole.input_ids), whole
    if length > sequence_length:  # cut by the tokenizer, which keeps its special tokens
        cut = tokenizer(
            *texts, return_token_type_ids=True, truncation=True, max_length=sequence_length
        )
        tokenizer.backend_tokenizer.no_truncation()  # truncation would change its identity()
    # A tokenizer may drop characters, such as those without width: such a text has no token.
    has_tokens = {*range(len(texts))} <= {*whole.sequence_ids(0)}
    has_text = has_tokens and all(text.strip() for text in texts)
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
    """One micro-batch of one rank, for classification. All tensors are int64."""

    input_ids_MT: Tensor
    """[M, T], token ids, padded with the pad token."""
    attention_mask_MT: Tensor
    """[M, T], 1 for the tokens of an example, 0 for padding."""
    segment_ids_MT: Tensor | None
    """[M, T], token_type_ids of transformers: 0 in the first text of a pair, 1 in the second. None
    if the model has none."""
    labels_M: Tensor
    """[M], number of the class of each row; -100 for filler rows."""
    rows_M: tuple[int, ...]
    """Row numbers in the stream of rows that a run trains on (see ``Rows``); -1 for filler rows."""
    lengths_M: tuple[int, ...]
    """Number of tokens of each row, without the padding at its end; 0 for filler rows."""

    @property
    def num_targets(self) -> int:
        """Number of examples that have a loss, which filler rows do not."""
        return int((self.labels_M != NOT_A_TARGET).sum())

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """Return the keyword arguments of the model's forward by name: tensors [M, T] on
        ``device``."""
        inputs = {"input_ids": self.input_ids_MT, "attention_mask": self.attention_mask_MT}
        if self.segment_ids_MT is not None:
            inputs["token_type_ids"] = self.segment_ids_MT
        return {name: t.to(device) for name, t in inputs.items()}


def _filler(rows: Rows, real: Collection[LabelledDocument]) -> LabelledDocument:
    """Return a copy without a label of the shortest of some documents, or of the data's first."""
    some = real or [cast(LabelledDocument, rows.documents[0])]
    shortest = min(some, key=lambda document: len(document.input_ids))
    return replace(shortest, labels=np.array([NOT_A_TARGET]))


def labelled_batch(
    rows: Rows, numbers: tuple[int, ...], *, pad_id: int, shuffle: bool
) -> LabelledBatch:
    """Make a micro-batch for classification: one example per row, padded to the longest row.

    A filler row has no loss and completes the last global batch. It is a copy of the shortest
    example of the batch, or of the first of the data set: some models, such as BART, look for the
    same special tokens in every row.

    Args:
        rows: rows of the data set, each with one ``LabelledDocument``.
        numbers: row numbers in the stream of rows that a run trains on (see ``Rows``), one for each
            row of the batch; ``FILLER`` stands for a filler row.
        pad_id: token id used as padding.
        shuffle: True to read each epoch in its own random order; False to keep the order of the
            data.

    Returns:
        The batch, with its tensors on CPU.
    """

    def example(number: int) -> LabelledDocument:
        (place,) = rows.document_numbers(rows.index(number, shuffle=shuffle))
        return cast(LabelledDocument, rows.documents[place])

    real = {n: example(n) for n in numbers if n != FILLER}
    filler = _filler(rows, real.values()) if FILLER in numbers else None
    parts = [real.get(n) or cast(LabelledDocument, filler) for n in numbers]
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
