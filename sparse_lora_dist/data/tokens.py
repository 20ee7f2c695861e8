"""Tokenise examples into documents: token ids with labels, at most ``--sequence_length`` tokens
each.

Plain text that is too long is cut into several documents. A prompt with its response, or a chat,
that is too long is left out and counted.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.chat import TrainOn, encode_chat, encode_text, end_of_turn
from sparse_lora_dist.data.examples import Examples
from sparse_lora_dist.data.fields import (
    DEFAULTS,
    TOOLS,
    ExampleError,
    Fields,
    find_fields,
    find_template,
    refuse_unsupported,
    renders_tools,
    tools_of,
)
from sparse_lora_dist.data.local_files import Columns
from sparse_lora_dist.data.notes import (
    no_document,
    no_end,
    not_learned,
    notes_on_chats,
    notes_on_text,
)
from sparse_lora_dist.data.read_files import cache_of, plainly, read_examples, readable
from sparse_lora_dist.data.reading import Reading, describe, template_source, unread_keys
from sparse_lora_dist.errors import UserError

Ints = npt.NDArray[np.int64]
NOT_A_TARGET = -100
"""Label of a token or row without a loss; torch's cross entropy ignores it."""
CACHE_VERSION = 5
"""Version of the cache of tokens. Increase it when a change of this code gives other tokens for the
same text, so that old caches are not used."""
TXT = Fields(kind="text", columns=("text",))
"""The column of plain text files."""
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int64"),
        "num_targets": datasets.Value("int64"),
    }
)
"""Columns of the cache of tokens, which has one row for each document. ``length`` and
``num_targets`` are numbers of tokens."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One tokenised example, or a part of a plain text."""

    input_ids: Ints
    """int64 [number of tokens], token ids."""
    labels: Ints
    """int64 [number of tokens], target ids, not shifted; -100 for tokens without a loss. The first
    is always -100, so that in a packed row no document predicts the first token of the next."""


class Documents:
    """Sequence of the documents of a data set, in the order of the data. Each is read from disk
    when it is indexed. Documents that are too long or have no target (a token that has a loss) are
    left out."""

    def __init__(self, table: datasets.Dataset, *, sequence_length: int) -> None:
        """Make documents of a cached table, without those that are too long or have no target.

        Args:
            table: table with the columns ``FEATURES``, one row for each document.
            sequence_length: most tokens of a document; longer ones are left out.
        """
        sizes = table.select_columns(["length", "num_targets"]).with_format("numpy")[:]
        length, num_targets = sizes["length"], sizes["num_targets"]
        fits = length <= sequence_length
        self._table = table.with_format("numpy", columns=["input_ids", "labels"])
        self._kept = np.flatnonzero(fits & (num_targets > 0))
        self.sequence_length = sequence_length
        self.lengths: Ints = length[self._kept].astype(np.int64)
        """int64 [len(self)], number of tokens of each document."""
        self.num_tokens = int(self.lengths.sum())
        self.num_targets = int(num_targets[self._kept].sum())
        self.too_long = int((~fits).sum())
        """Number of examples left out because they are longer than ``sequence_length``."""
        self.no_target = int((fits & (num_targets == 0)).sum())
        """Number of examples left out because none of their tokens is a target."""
        self.longest = int(length.max(initial=0))
        """Number of tokens of the longest example, even if it is left out."""
        self.reading: Reading | None = None
        """What of the data set was read; None if the documents come from no data set."""
        self.template: str | None = None
        """Jinja text that rendered the chats; None if no chat was rendered."""
        self.ends: Mapping[str, int] = {}
        """Token that ends an answer, or a text -> its id."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Document:
        record = self._table[int(self._kept[index])]
        return Document(
            input_ids=record["input_ids"].astype(np.int64),
            labels=record["labels"].astype(np.int64),
        )

    def tokens_and_labels(self, indices: Sequence[int]) -> Iterator[tuple[Ints, Ints]]:
        """Yield the token ids and labels of several documents, which is faster than one by one.

        Args:
            indices: indices of the documents.
        """
        for start in range(0, len(indices), 512):
            places = self._kept[list(indices[start : start + 512])].tolist()
            records = self._table[places]
            for ids, labels in zip(records["input_ids"], records["labels"], strict=True):
                yield ids.astype(np.int64), labels.astype(np.int64)

    def targets_among(self, ids: Collection[int]) -> list[int]:
        """Return which of some token ids are targets, from the first documents in which any is;
        [] if none ever is.

        Args:
            ids: token ids, such as those that end an answer.
        """
        wanted = np.array(sorted(ids), dtype=np.int32)
        for rows in self._table.select_columns(["labels"]).with_format("arrow").iter(1000):
            labels = rows["labels"].combine_chunks().flatten().to_numpy()
            found = np.intersect1d(labels, wanted)
            if len(found):
                return [int(i) for i in found]
        return []

    def first_with_id_from(self, least: int) -> tuple[int, int] | None:
        """Return the index of the first document that has a token id of at least ``least``, and the
        largest id in it; None if there is none. Reads all documents."""
        found = self._table.select_columns(["input_ids"]).with_format("arrow")
        for start in range(0, len(found), 1000):
            lists = found[start : start + 1000]["input_ids"].combine_chunks()
            if not (lists.flatten().to_numpy() >= least).any():
                continue
            for index in np.flatnonzero((self._kept >= start) & (self._kept < start + 1000)):
                largest = int(self[int(index)].input_ids.max())
                if largest >= least:
                    return int(index), largest
        return None

    def report(self) -> str:
        """Return one line of text: the number of documents, tokens and targets, and how many
        examples are left out."""
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
    """Read, check and tokenise examples for language modelling. Not a collective. The token ids are
    cached on disk.

    Examples are chats if there is a ``messages`` column, pairs if there are prompt and response
    columns, and otherwise plain text. A ``.txt`` file is one long plain text, since plays and books
    have no marks between documents. The whole file is tokenised in one call, which takes about 100
    bytes of memory per token.

    Args:
        source: file, folder or id of a Hugging Face hub data set; see ``read_examples``.
        tokenizer: tokenizer of the model.
        text_field: name of the column of plain text.
        prompt_field: name of the column of prompts.
        response_field: name of the column of responses.
        chat_template: jinja text or the path of a file with it; None uses the tokenizer's own.
        train_on: ``response`` takes the loss on responses and assistant turns only, ``all`` on
            every token. The loss of plain text is always on every token.
        sequence_length: most tokens of a document, at least 2.
        max_samples: number of examples to read, from the first on; None reads all.
        column_names: names of the columns of a table without a header line; () for other data.
        flag: the command-line flag whose value is ``source``, for messages.
        split: split of a folder or hub data set, e.g. "train".

    Returns:
        The documents, in the order of the data.

    Raises:
        UserError: the source or an example is wrong (with file and line), or no example is left.
    """
    assert sequence_length >= 2, "a document of one token has nothing to predict"
    examples = read_examples(
        source, split=split, max_samples=max_samples, flag=flag, column_names=column_names
    )
    place = f"{flag} {source}"
    options = {
        "text_field": text_field,
        "prompt_field": prompt_field,
        "response_field": response_field,
    }
    fields = (
        TXT
        if examples.is_plain_text
        else find_fields(examples.names.columns, **options, place=place)
    )
    fields, template = _with_template(examples, fields, tokenizer, chat_template, place)
    read = {*fields.all_columns, TOOLS}
    examples = examples.narrowed(name for name in examples.names.columns if name in read)

    def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
        if fields.kind == "text":
            return _text_rows(encode_text(tokenizer, fields.text(record)), sequence_length)
        encoded = encode_chat(
            tokenizer,
            fields.messages(record),
            template=template,
            train_on=train_on,
            tools=tools_of(record) if fields.has_tools else None,
        )
        return [document_row(encoded.ids, encoded.is_target, sequence_length)]

    key = (CACHE_VERSION, fields, template, train_on, sequence_length, *identity(tokenizer))
    table = tokenise(examples, fields.all_columns, rows_of, key)
    documents = Documents(table, sequence_length=sequence_length)
    if len(documents) == 0:
        found = f"{place} has no document to train on: {documents.report()}."
        any_too_long = documents.too_long > 0
        why = no_document(examples, fields, tokenizer, template, any_too_long=any_too_long)
        raise UserError(f"{found} {why}")
    documents.template, documents.ends = template, _ends(tokenizer, fields, template)
    reading = _reading(documents, examples, fields, tokenizer, template, chat_template, train_on)
    is_txt = examples.is_plain_text
    unused = {f"--{name}": is_txt and options[name] != DEFAULTS[name] for name in options}
    unused["--chat_template"] = chat_template is not None and fields.kind == "text"
    unused["--column_names"] = bool(column_names) and not examples.is_table
    documents.reading = reading.with_unused(unused)
    return documents


def _with_template(
    examples: Examples,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str | None,
    place: str,
) -> tuple[Fields, str | None]:
    """Return the columns that are read, with ``tools`` only if it is rendered, and the template of
    chats and pairs."""
    columns = examples.names.columns
    if fields.kind == "text":
        return fields, None
    refuse_unsupported(columns, place)
    template = find_template(tokenizer, chat_template, has_tools=TOOLS in columns)
    if fields.kind == "messages" and template is None:
        raise UserError(
            f"{place} has a column 'messages', but the tokenizer has no chat "
            "template. Give one with --chat_template."
        )
    return replace(fields, has_tools=renders_tools(columns, template)), template


def _ends(
    tokenizer: PreTrainedTokenizerFast, fields: Fields, template: str | None
) -> dict[str, int]:
    """Return the tokens that end an answer, or a text, with their ids."""
    eos = tokenizer.eos_token_id
    ends = set() if eos is None else {int(eos)}
    if fields.kind != "text":
        # A template may refuse a chat of one question and its answer.
        with suppress(ExampleError):
            ends = end_of_turn(tokenizer, template=template)
    ids = sorted(ends)
    return dict(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True))


def _reading(
    documents: Documents,
    examples: Examples,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    chat_template: str | None,
    train_on: TrainOn,
) -> Reading:
    """Return what was read of data for language modelling."""
    if fields.kind == "text":
        return describe(
            examples, fields.all_columns, notes=notes_on_text(examples, fields, tokenizer)
        )
    learned = tokenizer.convert_ids_to_tokens(documents.targets_among(documents.ends.values()))
    finds_turns = train_on == "response" and fields.kind == "messages"
    notes = (
        "" if learned else no_end(documents.ends),
        not_learned(examples, template) if finds_turns else "",
        *notes_on_text(examples, fields, tokenizer),
        *notes_on_chats(examples, fields, tokenizer, template, train_on),
    )
    return describe(
        examples,
        fields.all_columns,
        unread_columns=unread_keys(examples, fields, tokenizer, template),
        template=template_source(chat_template, template, tokenizer.chat_template),
        answer_ends=tuple(learned),
        notes=tuple(filter(None, notes)),
    )


def tokenise(
    examples: Examples,
    columns: Sequence[str],
    rows_of: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
    key: tuple[Any, ...],
    features: datasets.Features = FEATURES,
) -> datasets.Dataset:
    """Tokenise examples, and cache the result on disk.

    Args:
        examples: examples to tokenise.
        columns: names of the columns that ``rows_of`` reads.
        rows_of: function that tokenises one example. Its argument is a dict from column to value,
            its result a list of dicts with the keys ``features``, one for each document that the
            example gives. It raises ``ExampleError`` if the example is wrong.
        key: all values that the result depends on besides the examples. The cached result is used
            again only if all of them are equal.
        features: names and types of the columns of the result.

    Returns:
        Table of the results of all examples, one row for each document, in order.

    Raises:
        UserError: an example is wrong; the message has its file and line.
    """

    def rows_of_batch(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows: list[dict[str, Any]] = []
        for i, index in enumerate(indices):
            try:
                record = examples.decoded({name: values[i] for name, values in batch.items()})
                rows += rows_of(record)
            except ExampleError as error:
                raise examples.fault(index, str(error)) from error
            # Text that the tokenizer does not take.
            except Exception as error:
                raise examples.fault(
                    index,
                    f"This example cannot be tokenised: {plainly(error)}. Correct it, or remove "
                    "it.",
                ) from error
        return {column: [row[column] for row in rows] for column in features}

    table = examples.only(columns)
    # What an example causes is an error with its file and line already.
    with readable(examples.source, cache_of(table)):
        return table.map(
            rows_of_batch,
            with_indices=True,
            batched=True,
            batch_size=100,
            remove_columns=table.column_names,
            features=features,
            # Otherwise datasets would pickle the tokenizer, whose inner state changes with use.
            new_fingerprint=Hasher.hash((table._fingerprint, *key)),
            desc="tokenise",
        )


def document_row(ids: list[int], is_target: list[bool], sequence_length: int) -> dict[str, Any]:
    """Make one row of the cache of tokens, with the columns ``FEATURES``.

    Args:
        ids: token ids of a document.
        is_target: for each token, True if it has a loss. The first token never has one.
        sequence_length: most tokens of a document.

    Returns:
        Dict with the keys ``FEATURES``. For a longer document the lists of tokens and labels are
        empty, but the numbers of tokens and targets are given.
    """
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
    """Cut a text into parts of at most ``sequence_length`` tokens, and make one row of the cache of
    tokens for each.

    Each part begins with the last token of the part before, as context without a loss. So every
    token of the text has a loss (is a target) exactly once, except the first, which has none:

        tokens 1 2 3 4 5 6, sequence_length 3: parts (1 2 3) (3 4 5) (5 6), targets 2 3, 4 5, 6
    """
    starts = range(0, max(len(ids) - 1, 1), sequence_length - 1)
    parts = [ids[start : start + sequence_length] for start in starts]
    return [document_row(part, [True] * len(part), sequence_length) for part in parts]


def identity(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return texts that identify a tokenizer: its JSON, its special tokens, and settings outside of
    its JSON that change tokens, if they are unusual.

    Tokenizers that give different tokens have different texts. So the texts are part of the ``key``
    of ``tokenise``, and the cache of another tokenizer is not used.
    """
    usual = {"truncation_side": "right", "split_special_tokens": False}
    settings = {name: getattr(tokenizer, name) for name in usual}
    own = tuple(f"{n} {value}" for n, value in settings.items() if value != usual[n])
    special = str(sorted(tokenizer.special_tokens_map.items()))
    return tokenizer.backend_tokenizer.to_str(), special, *own
