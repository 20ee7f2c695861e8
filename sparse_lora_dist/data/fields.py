"""Find the columns that hold the text, and turn an example into text or chat messages."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.examples import MESSAGES as MESSAGES
from sparse_lora_dist.errors import UserError

Message = dict[str, Any]
HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can write and no Unicode text has."""
Tools = list[Any] | None
"""The functions that a model may call in a chat, as JSON schemas; None if there are none."""
TOOLS = "tools"
"""Name of the column of ``Tools``, which chat templates render."""
NOT_SUPPORTED = "chat_template_kwargs"
"""Name of a column that changes how a template renders a chat, which is not supported."""
DEFAULTS = {"text_field": "text", "prompt_field": "prompt", "response_field": "response"}
"""Default values of the options that name columns. An option with another value was given by the
user, and decides."""


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
    has_tools: bool = False
    """True if the examples are rendered with the column ``tools``."""

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Names of all columns that are read."""
        return (*self.columns, *((TOOLS,) if self.has_tools else ()))

    def text(self, record: Mapping[str, Any]) -> str:
        """Return the text of an example. Only for a data set whose ``kind`` is "text".

        Args:
            record: the example as a dict from column to value.

        Raises:
            ExampleError: the value is missing or not text.
        """
        return text_of(record.get(self.columns[0]), repr(self.columns[0]))

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
            return chat_of(record.get(MESSAGES))
        prompt, response = (text_of(record.get(c), repr(c)) for c in self.columns)
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]


def find_fields(
    columns: Sequence[str],
    *,
    text_field: str,
    prompt_field: str,
    response_field: str,
    place: str,
) -> Fields:
    """Find the columns that hold the text of a data set. An option that is not the default decides.
    Otherwise it is the column "messages" if it exists, otherwise those of prompt and response,
    otherwise that of plain text.

    Args:
        columns: names of the columns of the data set.
        text_field: name of the column of plain text.
        prompt_field: name of the column of prompts.
        response_field: name of the column of responses.
        place: text with which the error message begins, e.g. "--data x.jsonl".

    Raises:
        UserError: none of these columns exists, or not those of an option that was given; the
            message lists the columns that do. Or the options contradict each other.
    """
    names = {"text_field": text_field, "prompt_field": prompt_field}
    names["response_field"] = response_field
    given = [option for option in names if names[option] != DEFAULTS[option]]
    has_pair, has_tools = {prompt_field, response_field} <= set(columns), TOOLS in columns
    pair = Fields(kind="pair", columns=(prompt_field, response_field), has_tools=has_tools)
    text = Fields(kind="text", columns=(text_field,))
    if given:
        return _given_fields(columns, names, given, pair, text, place)
    if MESSAGES in columns:
        return Fields(kind="messages", columns=(MESSAGES,), has_tools=has_tools)
    if has_pair or text_field in columns:
        return pair if has_pair else text
    raise UserError(
        f"{place} has neither the column {MESSAGES!r}, nor {prompt_field!r} with "
        f"{response_field!r}, nor {text_field!r}. Its columns are: {', '.join(columns)}. Name the "
        "columns of its text with --prompt_field and --response_field, or --text_field."
    )


def _given_fields(
    columns: Sequence[str],
    names: Mapping[str, str],
    given: Sequence[str],
    pair: Fields,
    text: Fields,
    place: str,
) -> Fields:
    """Return the columns that options which the user gave name.

    Args:
        columns: names of the columns of the data set.
        names: option -> column, of all options.
        given: options that the user gave, at least one.
        pair: fields of prompt and response.
        text: fields of plain text.
        place: text with which an error message begins.
    """
    if given[0] == "text_field" and len(given) > 1:
        raise UserError(
            f"--text_field {names['text_field']} is for plain text, but --{given[1]} "
            f"{names[given[1]]} for prompts with responses. Give one of them."
        )
    chosen = text if given[0] == "text_field" else pair
    if len({*chosen.columns}) < len(chosen.columns):
        raise UserError(
            f"--prompt_field and --response_field are both {names['prompt_field']}. Name the two "
            "columns."
        )
    absent = [name for name in chosen.columns if name not in columns]
    if absent:
        options = " ".join(f"--{option} {names[option]}" for option in given)
        raise UserError(
            f"{place} has no column {' and no '.join(map(repr, absent))}, which {options} needs. "
            f"Its columns are: {', '.join(columns)}. Name columns that it has with --prompt_field "
            "and --response_field, or --text_field."
        )
    return chosen


def refuse_unsupported(columns: Sequence[str], place: str) -> None:
    """Raise UserError if a data set has a column that changes what a chat template renders, and
    that is not supported.

    Args:
        columns: names of the columns of the data set.
        place: text with which the error message begins, e.g. "--data x.jsonl".
    """
    if NOT_SUPPORTED in columns:
        raise UserError(
            f"{place} has a column {NOT_SUPPORTED!r}, which is not supported: each chat is "
            "rendered with the template's own defaults. Write the options into a --chat_template, "
            "and remove this column."
        )


def refuse_broken_template(tokenizer: PreTrainedTokenizerFast, template: str, place: str) -> None:
    """Raise UserError if a chat template is no jinja text, which no chat could correct.

    Args:
        tokenizer: tokenizer of the model.
        template: text of the template.
        place: text with which the message begins, e.g. "--chat_template a.jinja".
    """
    chat = [{"role": "user", "content": "a"}]
    try:
        tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{place} is broken in line {error.lineno}: {str(error.message).rstrip('.')}. Correct "
            "the template, or give another --chat_template."
        ) from error
    except Exception:  # noqa: S110  # it may refuse this chat, and not those of the data
        pass


def renders_tools(columns: Collection[str], template: str | None) -> bool:
    """Return True if a data set has a column ``tools`` and the chat template names it."""
    return TOOLS in columns and template is not None and names(template, TOOLS)


def names(template: str, word: str) -> bool:
    """Return True if a word, such as a key of messages, occurs in the text of a template."""
    return re.search(rf"\b{re.escape(word)}\b", template) is not None


def tools_of(record: Mapping[str, Any]) -> Tools:
    """Return the functions that a model may call in a chat; None if the example has none.

    Args:
        record: the example as a dict from column to value.

    Raises:
        ExampleError: the column ``tools`` is neither a list nor the JSON text of one, or has half
            of a surrogate pair.
    """
    value = record.get(TOOLS)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ExampleError(f"{TOOLS!r} is text, but not valid JSON: {error}.") from error
    if not value:
        return None
    if not isinstance(value, list):
        raise ExampleError(
            f"{TOOLS!r} must be a list of functions, got {type(value).__name__}: {str(value)[:40]}"
        )
    refuse_halves(value, repr(TOOLS))
    return value


def refuse_halves(value: Any, name: str) -> None:
    """Raise an error if a text has half of a surrogate pair, which no tokenizer takes.

    Args:
        value: a text, or a list or dict with texts.
        name: name of the value for the error message, e.g. its column in quotes.

    Raises:
        ExampleError: it has one.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if half := HALF.search(text):
        near = text[max(half.start() - 20, 0) : half.end() + 20]
        raise ExampleError(
            f"{name} has half of a surrogate pair, which no Unicode text has, in {near!r}. Correct "
            "it, or remove the example."
        )


def text_of(value: Any, name: str) -> str:
    """Return ``value`` if it is text, otherwise raise an error.

    Args:
        value: value of one column of an example, of any type.
        name: name of the value for the error message, e.g. its column in quotes.

    Raises:
        ExampleError: ``value`` is None or not text, or has half of a surrogate pair.
    """
    if value is None:
        raise ExampleError(f"{name} is missing or null. It must be text.")
    if not isinstance(value, str):
        raise ExampleError(f"{name} must be text, got {type(value).__name__}: {str(value)[:40]}")
    refuse_halves(value, name)
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
            f"{MESSAGES!r} must be a list of at least one object with role and content, got "
            f"{str(value)[:40]}"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise ExampleError(
                f"Message {number} must be an object with role and content, got {str(message)[:40]}"
            )
        if message.get("content") is None and message.get("tool_calls"):
            raise ExampleError(
                f"'content' of message {number} is missing or null beside tool_calls. It must be "
                'text. Give it "".'
            )
        for key in ("role", "content"):
            text_of(message.get(key), f"{key!r} of message {number}")
        if len(message) > 2:  # such as the arguments of tool_calls
            refuse_halves(message, f"Message {number}")
    return value
