"""Examples -> documents: token ids with labels, at most ``--sequence_length`` tokens each.

Plain text is cut into parts. A pair or chat that is too long is left out and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.chat import TrainOn, encode_chat, encode_text, find_template
from sparse_lora_dist.data.fields import ExampleError, find_fields
from sparse_lora_dist.data.read_files import Columns, Examples, read_examples
from sparse_lora_dist.errors import UserError

Ints = npt.NDArray[np.int64]
NOT_A_TARGET = -100
"""Label that torch's cross entropy ignores."""
CACHE_VERSION = 1
"""Increase it when the same text gives other tokens, so that old caches are not used."""
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int64"),
        "num_targets": datasets.Value("int64"),
    }
)
"""Columns of the cache: one row for each document."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One tokenised example, or a part of one."""

    input_ids: Ints
    """int64 [T], token ids."""
    labels: Ints
    """int64 [T], target ids, not shifted; -100 for tokens without a loss. The first is always -100,
    so that in a packed row no document predicts the first token of the next."""


class Documents:
    """The documents of a data set, in its order: a sequence of ``Document``, read from disk."""

    def __init__(self, table: datasets.Dataset, *, sequence_length: int) -> None:
        sizes = table.select_columns(["length", "num_targets"]).with_format("numpy")[:]
        length, num_targets = sizes["length"], sizes["num_targets"]
        fits = length <= sequence_length
        self._table = table.with_format("numpy", columns=["input_ids", "labels"])
        self._kept = np.flatnonzero(fits & (num_targets > 0))
        self.sequence_length = sequence_length
        self.lengths: Ints = length[self._kept].astype(np.int64)
        """int64 [len(self)], tokens of each document."""
        self.num_tokens = int(self.lengths.sum())
        self.num_targets = int(num_targets[self._kept].sum())
        self.too_long = int((~fits).sum())
        """Number of examples left out as they are longer than ``sequence_length``."""
        self.no_target = int((fits & (num_targets == 0)).sum())
        """Number of examples left out as none of their tokens is a target."""
        self.longest = int(length.max(initial=0))
        """Tokens of the longest example, also if it is left out."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Document:
        record = self._table[int(self._kept[index])]
        return Document(
            input_ids=record["input_ids"].astype(np.int64),
            labels=record["labels"].astype(np.int64),
        )

    def report(self) -> str:
        """One line: the documents there are to train on, and the examples left out."""
        parts = [
            f"{len(self):,} documents, {self.num_tokens:,} tokens, {self.num_targets:,} targets"
        ]
        if self.too_long:
            parts.append(
                f"{self.too_long:,} left out, longer than --sequence_length {self.sequence_length} "
                f"(raise it to {self.longest:,}, the longest, to keep all)"
            )
        if self.no_target:
            parts.append(f"{self.no_target:,} left out, without a target token")
        return "; ".join(parts)


def load_documents(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    text_field: str,
    prompt_field: str,
    response_field: str,
    chat_template: str | None,
    train_on: TrainOn,
    sequence_length: int,
    max_samples: int | None,
    column_names: Columns = (),
    flag: str = "--data",
    split: str = "train",
) -> Documents:
    """Read, check and tokenise examples. Not a collective. The tokens are cached on disk.

    Examples are chats if there is a ``messages`` column, pairs if there are prompt and response
    columns, and else plain text. A ``.txt`` file is one long plain text (plays and books have no
    marks between documents); it is tokenised at once, which takes about 100 bytes per token.

    Args:
        source: file, folder or hub id; see ``read_examples``.
        text_field, prompt_field, response_field: columns of plain text, and of a pair.
        chat_template: jinja text or a file with it; None uses the tokenizer's own.
        train_on: ``response`` for the loss on assistant turns only; plain text is learned whole.
        sequence_length: most tokens of a document, at least 2.
        max_samples, column_names, flag, split: see ``read_examples``.

    Raises:
        UserError: the source or an example is wrong (with file and line), or no example is left.
    """
    assert sequence_length >= 2, "a document of one token has nothing to predict"
    examples = read_examples(
        source, split=split, max_samples=max_samples, flag=flag, column_names=column_names
    )
    fields = find_fields(
        examples.table.column_names,
        text_field="text" if examples.is_plain_text else text_field,
        prompt_field=prompt_field,
        response_field=response_field,
        place=f"{flag} {source}",
    )
    template = find_template(tokenizer, chat_template)
    if fields.kind == "messages" and template is None:
        raise UserError(f"{flag} {source}: chats need a template; give one with --chat_template")

    def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
        if fields.kind == "text":
            return _text_rows(encode_text(tokenizer, fields.text(record)), sequence_length)
        chat = fields.messages(record)
        encoded = encode_chat(tokenizer, chat, template=template, train_on=train_on)
        return [document_row(encoded.ids, encoded.is_target, sequence_length)]

    key = (CACHE_VERSION, fields, template, train_on, sequence_length, *identity(tokenizer))
    table = tokenise(examples, fields.columns, rows_of, key)
    documents = Documents(table, sequence_length=sequence_length)
    if len(documents) == 0:
        raise UserError(f"{flag} {source}: nothing is left to train on: {documents.report()}")
    return documents


def tokenise(
    examples: Examples,
    columns: Sequence[str],
    rows_of: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
    key: tuple[Any, ...],
    features: datasets.Features = FEATURES,
) -> datasets.Dataset:
    """Tokenise examples, and cache the result on disk.

    Args:
        examples: the examples.
        columns: columns that ``rows_of`` reads.
        rows_of: makes rows with the columns ``features`` of one example.
        key: all that the result depends on besides the examples; the name of the cache.
        features: columns of the result.

    Raises:
        UserError: with file and line, for the first example that ``rows_of`` refuses.
    """

    def rows_of_batch(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows: list[dict[str, Any]] = []
        for i, index in enumerate(indices):
            try:
                rows += rows_of({column: batch[column][i] for column in columns})
            # Text that is not UTF-8 is found only here, where Arrow decodes it.
            except (ExampleError, UnicodeDecodeError) as error:
                raise examples.fault(index, str(error)) from error
        return {column: [row[column] for row in rows] for column in features}

    table = examples.table.select_columns(list(columns))
    return table.map(
        rows_of_batch,
        with_indices=True,
        batched=True,
        batch_size=100,
        remove_columns=list(columns),
        features=features,
        # Otherwise datasets would pickle the tokenizer, whose inner state changes with use.
        new_fingerprint=Hasher.hash((table._fingerprint, *key)),
        desc="tokenise",
    )


def document_row(ids: list[int], is_target: list[bool], sequence_length: int) -> dict[str, Any]:
    """Make a row with the columns ``FEATURES``; without tokens for a document that is too long."""
    is_target = [False, *is_target[1:]][: len(ids)]
    fits = len(ids) <= sequence_length
    labels = [i if t else NOT_A_TARGET for i, t in zip(ids, is_target, strict=True)]
    return {
        "input_ids": ids if fits else [],
        "labels": labels if fits else [],
        "length": len(ids),
        "num_targets": sum(is_target),
    }


def _text_rows(ids: list[int], sequence_length: int) -> list[dict[str, Any]]:
    """Cut a text into parts of at most ``sequence_length`` tokens.

    Each part begins with the last token of the part before, as context only, so that every token of
    the text but its first is a target exactly once:

        tokens 1 2 3 4 5 6, sequence_length 3: parts (1 2 3) (3 4 5) (5 6), targets 2 3, 4 5, 6
    """
    starts = range(0, max(len(ids) - 1, 1), sequence_length - 1)
    parts = [ids[start : start + sequence_length] for start in starts]
    return [document_row(part, [True] * len(part), sequence_length) for part in parts]


def identity(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Values that differ between tokenizers, for the key of a cache."""
    return tokenizer.backend_tokenizer.to_str(), str(sorted(tokenizer.special_tokens_map.items()))
