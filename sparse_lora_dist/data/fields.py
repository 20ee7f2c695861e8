"""Which columns of a table hold the text, and one row of it -> text or a list of chat messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparse_lora_dist.errors import UserError

Message = dict[str, Any]
MESSAGES = "messages"


class ExampleError(Exception):
    """One example is wrong; whoever knows its file and line turns this into a UserError."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What an example is made of."""

    kind: Literal["messages", "pair", "text"]
    columns: tuple[str, ...]
    """``messages``; prompt and response; or the text."""

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
    """``messages`` if there is such a column, else prompt and response, else text.

    Raises:
        UserError: none of them is there; lists the columns that are.
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
    """``value``, once it is sure to be text; ``name`` says in an ExampleError what it is."""
    if value is None:
        raise ExampleError(f"{name} is missing or null; it must be text")
    if not isinstance(value, str):
        raise ExampleError(f"{name} must be text, got {type(value).__name__}: {str(value)[:40]}")
    return value


def chat_of(value: Any) -> list[Message]:
    """``value``, once it is sure to be a list of messages."""
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
