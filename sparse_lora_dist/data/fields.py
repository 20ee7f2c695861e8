"""Find the columns that hold the text, and turn an example into text or chat messages; and
find what a chat template can render.

A generation prompt is what a template writes for the model to answer next.
"""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.examples import MESSAGES as MESSAGES
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.small_files import is_json, whole_text

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

MARK = re.compile(r"(\{%[-+]?\s*generation\s*)(?:(-%\})\s*|(\+%\})|(%\})(?:\r\n?|\n)?)")
"""A {% generation %} mark and the white space that jinja strips after it."""
BEFORE_TAG = r"(?:\s*(\{%-)|(\{%\+)|(?:^[ \t]*)?(\{%))(?=\s*"
"""The beginning of a jinja tag and the white space that jinja strips before it."""
END_MARK = re.compile(BEFORE_TAG + "endgeneration)", re.MULTILINE)
LOOP_END = re.compile(BEFORE_TAG + "endfor)", re.MULTILINE)
BEGIN, END, END_OF_LOOP = "\ufdd0", "\ufdd1", "\ufdd2"
"""Characters that stand for the marks, and for the end of a round of a loop, in a rendered chat.
Unicode keeps them for use within a program; texts have none."""
ANSWER = "bxb"
CHAT: list[Message] = [
    {"role": "user", "content": "axa"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "cxc"},
]
"""A chat whose answer is in no template."""


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


def find_template(
    tokenizer: PreTrainedTokenizerFast, chat_template: str | None, *, has_tools: bool = False
) -> str | None:
    """Return the jinja text that renders chats.

    Args:
        tokenizer: its own template is used if ``chat_template`` is None.
        chat_template: value of ``--chat_template``: jinja text, or the path of a file with it.
        has_tools: True if the data have a column ``tools``. Of a tokenizer with several templates
            the one called "tool_use" is then used, if there is one.

    Returns:
        The jinja text; None if neither ``chat_template`` nor the tokenizer has one.

    Raises:
        UserError: ``chat_template`` is neither jinja text nor a file that can be read, or the
            tokenizer has several templates, none of which is for all chats; or the template is
            broken, or writes a generation prompt unasked that cannot be left out.
    """
    if chat_template is None:
        template, place = _own_template(tokenizer, has_tools), "The tokenizer's chat template"
    else:
        template, place = _given_template(chat_template), f"--chat_template {chat_template}"
    if template is not None:
        refuse_broken_template(tokenizer, template, place)
        unasked_prompt(tokenizer, template)  # refuses one that cannot be told from the chat
    return template


def _given_template(chat_template: str) -> str:
    if not is_file(chat_template):
        if is_template(chat_template):
            return chat_template
        raise UserError(
            f"--chat_template {chat_template} is neither a file that exists nor jinja text, which "
            "has {{ or {% in it. Give the path of a file, or the text of a template."
        )
    text = whole_text(Path(chat_template).expanduser(), f"--chat_template {chat_template}")
    if is_json(text):
        raise UserError(
            f"--chat_template {chat_template} is a JSON file, and no jinja text. Write the text "
            "of its key chat_template into a file of its own, with line breaks for \\n."
        )
    return text


def is_template(text: str) -> bool:
    """Return True if ``text`` is the text of a jinja template, and not the path of a file."""
    return ("{{" in text or "{%" in text) and not is_file(text)


def is_file(text: str) -> bool:
    """Return True if ``text`` is the path of a file. The name of a file may have braces too."""
    return os.path.isfile(os.path.expanduser(text))


def _own_template(tokenizer: PreTrainedTokenizerFast, has_tools: bool) -> str | None:
    own: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(own, dict):
        return own or None
    name = "tool_use" if has_tools and "tool_use" in own else "default"
    if name not in own:
        raise UserError(
            f"The tokenizer has several chat templates, called {', '.join(sorted(own))}, and none "
            "called default. Write the one to use into a file, and give it with --chat_template."
        )
    return own[name]


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


@lru_cache(maxsize=1)
def has_marks(template: str | None) -> bool:
    """Return True if a template has {% generation %} marks around what the model writes."""
    comments = r"\{#.*?#\}"
    return template is not None and bool(MARK.search(re.sub(comments, "", template, flags=re.S)))


@lru_cache(maxsize=1)
def with_signs(template: str) -> str:
    """Return a template that writes ``BEGIN`` and ``END`` at its marks, and else the same."""
    begins = MARK.sub(rf"\1\2\3\4{{{{ '{BEGIN}' }}}}", template)
    return END_MARK.sub(rf"{{{{ '{END}' }}}}\1\2\3", begins)


@lru_cache(maxsize=2)
def unasked_prompt(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """Return the generation prompt that a template writes after every chat, whether it is asked to
    or not, such as that of the first Llama 3; "" if it writes none unasked.

    Args:
        tokenizer: tokenizer of the model.
        template: jinja text that renders chats.

    Raises:
        UserError: it writes one, and where it begins cannot be found.
    """

    def rendered(num_messages: int, text: str = template, *, asks: bool = False) -> str:
        chat = tokenizer.apply_chat_template(
            CHAT[:num_messages], chat_template=text, tokenize=False, add_generation_prompt=asks
        )
        return str(chat)

    try:
        asked, waiting = rendered(1, asks=True), rendered(1)
        chat, longer = rendered(2), rendered(3)
        signed = rendered(2, LOOP_END.sub(rf"{{{{ '{END_OF_LOOP}' }}}}\1\2\3", template))
    except Exception:  # it may refuse this chat, and not those of the data
        return ""
    tail, other = (text.rpartition(ANSWER)[2] for text in (chat, longer))
    # What follows the answer only if no further message does.
    last = tail[len(os.path.commonprefix([tail, other])) :]
    prompt = signed.rpartition(END_OF_LOOP)[2]
    is_whole = signed.replace(END_OF_LOOP, "") == chat and prompt.endswith(last)
    # If it is asked, it may write more of it, as Command A's does.
    if last.strip() and chat.startswith(asked) and is_whole and waiting.endswith(prompt):
        return prompt
    if not (last.strip() and asked.endswith(last) and chat.startswith(asked)):
        return ""
    raise UserError(
        f"The chat template asks for an answer, with {last!r} at the end, also after the last "
        "answer of a chat, and where this begins cannot be found. Give a --chat_template that "
        "writes it behind the loop over messages, within {% if add_generation_prompt %} ... "
        "{% endif %}."
    )


def renders_tools(columns: Collection[str], template: str | None) -> bool:
    """Return True if a data set has a column ``tools`` and the chat template names it."""
    return TOOLS in columns and template is not None and names(template, TOOLS)


def names(template: str, word: str) -> bool:
    """Return True if a word, such as a key of messages, occurs in a tag of a template."""
    tags = " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))
    return re.search(rf"\b{re.escape(word)}\b", tags) is not None


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
