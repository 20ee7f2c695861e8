"""A row of a data set -> a chat that ends where the model is to answer, and the right answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sparse_lora_dist.config import DataConfig
from sparse_lora_dist.data.fields import MESSAGES, ExampleError, Message, text_of
from sparse_lora_dist.data.read import Examples, read_examples
from sparse_lora_dist.evaluation.answers import LETTERS

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Table:
    """The examples, and the columns that hold what is asked and what is right.

    A prompt is in ``--prompt_field``, else in ``question``; an answer in ``--response_field``, else
    in ``answer``. A column ``messages`` holds whole chats, which end with the answer.
    """

    examples: Examples
    prompt: str
    answer: str

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
        columns = examples.table.column_names
        return cls(
            examples=examples,
            prompt=_known(columns, data.prompt_field, "question"),
            answer=_known(columns, data.response_field, "answer"),
        )

    def make(self, make: Callable[["Table", Mapping[str, Any]], Made]) -> list[Made]:
        """What ``make`` makes of every example.

        Raises:
            UserError: with file, line and field, for the first that it refuses.
        """
        return list(self._made(make))

    def _made(self, make: Callable[["Table", Mapping[str, Any]], Made]) -> Iterator[Made]:
        for index, record in enumerate(self.examples.table):
            try:
                yield make(self, record)
            except ExampleError as error:
                raise self.examples.fault(index, str(error)) from error

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """The chat up to the answer."""
        if MESSAGES not in record:
            return [
                {"role": "user", "content": text_of(record.get(self.prompt), repr(self.prompt))}
            ]
        chat = record[MESSAGES] or []
        is_answered = bool(chat) and chat[-1].get("role") == "assistant"
        chat = chat[:-1] if is_answered else chat
        if not chat:
            raise ExampleError(f"{MESSAGES!r} has nothing to answer")
        return [
            {k: text_of(m.get(k), f"{k!r} of a message") for k in ("role", "content")} for m in chat
        ]

    def reference(self, record: Mapping[str, Any]) -> str:
        """The right answer as text."""
        if MESSAGES not in record:
            return text_of(record.get(self.answer), repr(self.answer))
        last: Message = (record[MESSAGES] or [{}])[-1]
        if last.get("role") != "assistant":
            raise ExampleError(f"{MESSAGES!r} does not end with an assistant's answer")
        return text_of(last.get("content"), "'content' of the last message")

    def choices(self, record: Mapping[str, Any]) -> tuple[list[str], int]:
        """(choices, place of the right one). ``choices`` is a list of texts, or, as on the hub,
        their ``text`` and ``label``; the answer an index from 0, a label or letter, or the text."""
        given: Any = record.get("choices")
        labels = list(LETTERS)
        if isinstance(given, dict):
            labels = list(given.get("label") or LETTERS)
            given = given.get("text")
        if not isinstance(given, list) or len(given) < 2:
            raise ExampleError(f"'choices' must be a list of at least two, got {str(given)[:40]}")
        texts = [text_of(choice, "a choice") for choice in given]
        return texts, _place(record.get(self.answer), texts, labels, repr(self.answer))


def _known(columns: Sequence[str], first: str, second: str) -> str:
    return first if first in columns or second not in columns else second


def _place(answer: Any, texts: Sequence[str], labels: Sequence[str], name: str) -> int:
    """Which choice is right. Text comes before label, and label before index, where it could be
    two of them."""
    ways = {str(i): i for i in range(len(texts))}
    ways |= {label: i for i, label in enumerate(labels[: len(texts)])}
    ways |= {text: i for i, text in enumerate(texts)}
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise ExampleError(f"{name} must be an index, a letter or a choice, got {answer!r}")
    if isinstance(answer, int) and 0 <= answer < len(texts):
        return answer
    if isinstance(answer, str) and answer.strip() in ways:
        return ways[answer.strip()]
    raise ExampleError(f"{name} is {answer!r}, which is none of its {len(texts)} choices")
