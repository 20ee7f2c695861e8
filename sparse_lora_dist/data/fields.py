"""Find the columns that hold the text, and read an example as text or as chat messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparse_lora_dist.errors import UserError

Message = dict[str, Any]
MESSAGES = "messages"


class ExampleError(Exception):
    """One example is wrong. The caller that knows its file and line raises a UserError instead."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The columns of a data set that hold its text."""

    kind: Literal["messages", "pair", "text"]
    """A chat; a prompt with its response; or plain text."""
    columns: tuple[str, ...]
    """Names: ("messages",), (prompt, response) or (text,)."""

    def text(self, record: Mapping[str, Any]) -> str:
        """The plain text of an example of kind ``text``."""
        return text_of(record[self.columns[0]], repr(self.columns[0]))

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """The chat of an example of the other kinds; a pair is a user and an assistant turn."""
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
    """Find the columns of the text: ``messages`` if it exists, else prompt and response, else text.

    Raises:
        UserError: none of them exists; names the columns that do.
    """
    if MESSAGES in columns:
        return Fields(kind="messages", columns=(MESSAGES,))
    if prompt_field in columns and response_field in columns:
        return Fields(kind="pair", columns=(prompt_field, response_field))
    if text_field in columns:
        return Fields(kind="text", columns=(text_field,))
    raise UserError(
        f"{place}: found neither {MESSAGES!r}, nor {prompt_field!r} with {response_field!r}, nor "
        f"{text_field!r}. Its columns are: {', '.join(columns)}. Name them with --prompt_field and "
        "--response_field, or --text_field"
    )


def text_of(value: Any, name: str) -> str:
    """Check that ``value`` is text, and return it.

    Args:
        name: what the value is, for the message.

    Raises:
        ExampleError: it is missing or not text.
    """
    if value is None:
        raise ExampleError(f"{name} is missing or null; it must be text")
    if not isinstance(value, str):
        raise ExampleError(f"{name} must be text, got {type(value).__name__}: {str(value)[:40]}")
    return value


def chat_of(value: Any) -> list[Message]:
    """Check that ``value`` is a list of {role, content}, and return it.

    Raises:
        ExampleError: it is not, or it is empty.
    """
    if not isinstance(value, list) or not value:
        raise ExampleError(
            f"{MESSAGES!r} must be a list of at least one {{role, content}}, got {str(value)[:40]}"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise ExampleError(
                f"message {number} must be {{role, content}}, got {str(message)[:40]}"
            )
        for key in ("role", "content"):
            text_of(message.get(key), f"{key!r} of message {number}")
    return value
