"""Find the columns that hold the text, and turn an example into text or chat messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparse_lora_dist.errors import UserError

Message = dict[str, Any]
MESSAGES = "messages"


class ExampleError(Exception):
    """Raised if an example is wrong. The message says what is wrong, but not in which file and
    line. The caller that knows these raises a ``UserError`` with both, from ``Examples.fault``."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The columns of a data set that hold its text, and the kind of its examples."""

    kind: Literal["messages", "pair", "text"]
    """Kind of each example: a chat, a prompt with its response, or plain text."""
    columns: tuple[str, ...]
    """Names of the columns: ("messages",) for chats; (prompt column, response column) for pairs;
    (text column,) for plain text."""

    def text(self, record: Mapping[str, Any]) -> str:
        """Return the text of an example. Only for a data set whose ``kind`` is "text".

        Args:
            record: the example as a dict from column to value.

        Raises:
            ExampleError: the value is missing or not text.
        """
        return text_of(record[self.columns[0]], repr(self.columns[0]))

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """Return the chat of an example. Only for a data set whose ``kind`` is "messages" or
        "pair". A prompt with its response becomes a chat of a user and an assistant message.

        Args:
            record: the example as a dict from column to value.

        Returns:
            The messages in order, dicts with the keys "role" and "content".

        Raises:
            ExampleError: a value is missing, not text, or not a list of messages.
        """
        if self.kind == "messages":
            return chat_of(record[MESSAGES])
        prompt, response = (text_of(record[c], repr(c)) for c in self.columns)
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]


def find_fields(
    columns: list[str],
    *,
    text_field: str,
    prompt_field: str,
    response_field: str,
    place: str,
) -> Fields:
    """Find the columns that hold the text of a data set: the column "messages" if it exists,
    otherwise those of prompt and response, otherwise that of plain text.

    Args:
        columns: names of the columns of the data set.
        text_field: name of the column of plain text.
        prompt_field: name of the column of prompts.
        response_field: name of the column of responses.
        place: text with which the error message begins, e.g. "--data x.jsonl".

    Raises:
        UserError: none of these columns exists; the message lists the columns that do.
    """
    if MESSAGES in columns:
        return Fields(kind="messages", columns=(MESSAGES,))
    if prompt_field in columns and response_field in columns:
        return Fields(kind="pair", columns=(prompt_field, response_field))
    if text_field in columns:
        return Fields(kind="text", columns=(text_field,))
    raise UserError(
        f"{place} has neither the column {MESSAGES!r}, nor {prompt_field!r} with "
        f"{response_field!r}, nor {text_field!r}. Its columns are: {', '.join(columns)}. Name the "
        "columns of its text with --prompt_field and --response_field, or --text_field."
    )


def text_of(value: Any, name: str) -> str:
    """Return ``value`` if it is text, otherwise raise an error.

    Args:
        value: value of one column of an example, of any type.
        name: name of the value for the error message, e.g. its column in quotes.

    Raises:
        ExampleError: ``value`` is None or not text.
    """
    if value is None:
        raise ExampleError(f"{name} is missing or null. It must be text.")
    if not isinstance(value, str):
        raise ExampleError(f"{name} must be text, got {type(value).__name__}: {str(value)[:40]}")
    return value


def chat_of(value: Any) -> list[Message]:
    """Return ``value`` if it is a list of at least one message, otherwise raise an error. A message
    is a dict in which "role" and "content" are text.

    Args:
        value: value of the column ``messages`` of an example, of any type.

    Raises:
        ExampleError: ``value`` is not such a list.
    """
    if not isinstance(value, list) or not value:
        raise ExampleError(
            f"{MESSAGES!r} must be a list of objects with role and content, got {str(value)[:40]}"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise ExampleError(
                f"Message {number} must be an object with role and content, got {str(message)[:40]}"
            )
        for key in ("role", "content"):
            text_of(message.get(key), f"{key!r} of message {number}")
    return value
