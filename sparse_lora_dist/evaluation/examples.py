"""A row of a data set -> a chat that ends where the model is to answer, and the right answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data.fields import MESSAGES, ExampleError, Message, chat_of, text_of
from sparse_lora_dist.data.read_files import Examples, read_examples
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.right_answers import LETTERS

Made = TypeVar("Made")

SHOWN = 5
"""Faulty examples that are named; the others are counted."""


class TooLong(ExampleError):
    """More tokens than a row takes."""

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(f"it has {tokens} tokens, more than --sequence_length {most}")
        self.tokens = tokens


@dataclass(frozen=True, kw_only=True)
class Table:
    """The examples, and the columns that hold what is asked and what is right.

    A prompt is in ``--prompt_field``, else in ``question``; an answer in ``--response_field``, else
    in ``answer``. A column ``messages`` holds whole chats, which end with the answer.
    """

    examples: Examples
    data: DataConfig

    @classmethod
    def read(cls, source: str, data: DataConfig, limit: int | None) -> "Table":
        """Not a collective, and slow at first: see ``first_on_its_node``."""
        examples = read_examples(
            source,
            split="test",
            max_samples=limit,
            flag="--eval_data",
            column_names=data.column_names,
        )
        return cls(examples=examples, data=data)

    def make(self, make: Callable[["Table", Mapping[str, Any]], Made]) -> list[Made]:
        """What ``make`` makes of every example.

        Raises:
            UserError: with file, line and fault of the first that it refuses, and how many more.
        """
        made: list[Made] = []
        faults: list[tuple[int, ExampleError]] = []
        for index, record in enumerate(self.examples.table):
            try:
                made.append(make(self, record))
            except ExampleError as error:
                faults.append((index, error))
        if faults:
            raise self._refusal(faults)
        return made

    def _refusal(self, faults: Sequence[tuple[int, ExampleError]]) -> UserError:
        lines = [str(self.examples.fault(index, str(error))) for index, error in faults[:SHOWN]]
        if len(faults) > SHOWN:
            lines.append(f"and {len(faults) - SHOWN:,} more")
        longest = max((e.tokens for _, e in faults if isinstance(e, TooLong)), default=0)
        if longest:
            lines.append(f"Set --sequence_length {longest} to take the longest.")
        return UserError("\n".join(lines))

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """The chat up to the answer."""
        if MESSAGES not in record:
            column = self.column("prompt")
            return [{"role": "user", "content": text_of(record[column], repr(column))}]
        chat = chat_of(record[MESSAGES])
        chat = chat[:-1] if chat[-1]["role"] == "assistant" else chat
        if not chat:
            raise ExampleError(f"{MESSAGES!r} has nothing to answer")
        return chat

    def reference(self, record: Mapping[str, Any]) -> str:
        """The right answer as text."""
        if MESSAGES not in record:
            column = self.column("response")
            return text_of(record[column], repr(column))
        last = chat_of(record[MESSAGES])[-1]
        if last["role"] != "assistant":
            raise ExampleError(f"{MESSAGES!r} does not end with an assistant's answer")
        return str(last["content"])

    def choices(self, record: Mapping[str, Any]) -> tuple[list[str], int]:
        """(choices, place of the right one). ``choices`` is a list of texts, or, as on the hub,
        their ``text`` and ``label``; the answer an index from 0, a label or letter, or the text."""
        given: Any = record.get("choices")
        labels: Sequence[object] = ()
        if isinstance(given, dict):
            labels, given = given.get("label") or (), given.get("text")
        if not isinstance(given, list) or len(given) < 2:
            raise ExampleError(f"'choices' must be a list of at least two, got {str(given)[:40]}")
        texts = [text_of(choice, "a choice") for choice in given]
        column = self.column("response")
        return texts, place_of(record[column], texts, labels or LETTERS, repr(column))

    def column(self, kind: str) -> str:
        """That of the prompt, or of the response.

        Raises:
            UserError: there is none.
        """
        flag, second = f"{kind}_field", {"prompt": "question", "response": "answer"}[kind]
        named, there = getattr(self.data, flag), self.examples.table.column_names
        if named in there:
            return str(named)
        is_default = named == getattr(DataConfig(), flag)
        if is_default and second in there:
            return second
        wanted = f"{named!r}, nor {second!r}" if is_default else repr(named)
        raise UserError(
            f"--eval_data {self.examples.source} has no column {wanted}. Its columns are: "
            f"{', '.join(there)}. Name the one of the {kind} with --{flag}"
        )


def place_of(answer: object, texts: Sequence[str], labels: Sequence[object], name: str) -> int:
    """Which choice is right, the first of those that are called so. A text is looked for among
    texts, then labels, then indices; a number is no text."""
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise ExampleError(f"{name} must be an index, a letter or a choice, got {answer!r}")
    places: dict[str, int] = {}
    named = texts if isinstance(answer, str) else ()
    for names in (named, labels[: len(texts)], range(len(texts))):
        for place, one in enumerate(names):
            places.setdefault(str(one).strip(), place)
    try:
        return places[str(answer).strip()]
    except KeyError:
        said = f"{name} is {answer!r}, which is none of its {len(texts)} choices"
        raise ExampleError(said) from None
