"""Record what of a data set is read and what is not, for the screen and the run folder."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.chat import render_text
from sparse_lora_dist.data.examples import (
    Examples,
    rows_left_out,
)
from sparse_lora_dist.data.fields import (
    MESSAGES,
    ExampleError,
    Fields,
    is_template,
    names,
    tools_of,
)
from sparse_lora_dist.data.folders import missing_shards

MOST_SHOWN = 6
"""Most names of a list on the screen. Further ones are only counted."""
LONGEST = 200
"""Most letters of a name on the screen."""
MOST_RECORDED = 1000
"""Most columns that are not read of which a record holds the names: an example may have columns
that no other has."""
READ_KEYS = ("role", "content")
"""Keys of a message that every template renders."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Record of what is read of a data set, and how."""

    source: str
    """File, folder or id of a hub data set, as the user gave it."""
    files: tuple[str, ...]
    """Files that are read, relative to the folder; empty if they are not on this machine."""
    unread_files: tuple[str, ...]
    """Other files of the folder."""
    columns: tuple[str, ...]
    """Columns that are read."""
    unread_columns: tuple[str, ...]
    """Other columns, and as "messages.KEY" the keys of messages that the template does not name."""
    template: str | None = None
    """Where the chat template comes from; None if no chat is rendered."""
    answer_ends: tuple[str, ...] | None = None
    """Tokens that end an answer and are learned; None if the data have no answers."""
    unused_options: tuple[str, ...] = ()
    """Options that were given, and that are not for data of this kind."""
    notes: tuple[str, ...] = ()
    """Sentences about what may not be as the user meant it."""

    def report(self) -> str:
        """Return one line of text for the screen."""
        parts = [f"read {shown(self.files or (self.source,))}"]
        if self.unread_files:
            parts.append(f"files not read: {shown(self.unread_files)}")
        parts.append(f"columns: {shown(self.columns)}")
        parts.append(f"columns not read: {shown(self.unread_columns)}")
        if self.template is not None:
            parts.append(f"chat template: {self.template}")
        if self.answer_ends is not None:
            parts.append(f"an answer ends with: {shown(self.answer_ends)}")
        if self.unused_options:
            parts.append(f"options not used: {shown(self.unused_options)}")
        return "; ".join(parts)

    def with_unused(self, is_unused: Mapping[str, bool]) -> "Reading":
        """Return this with the options that were given and are not used.

        Args:
            is_unused: option -> True if it was given and is not used for these data.
        """
        unused = tuple(option for option in is_unused if is_unused[option])
        return replace(self, unused_options=self.unused_options + unused)

    def record(self) -> dict[str, Any]:
        """Return all of it as a dict of JSON values."""
        return asdict(self)


def shown(names: Sequence[str]) -> str:
    """Return names as text, at most ``MOST_SHOWN`` of them; "none" if there are none."""
    more = f" and {len(names) - MOST_SHOWN:,} more" if len(names) > MOST_SHOWN else ""
    # A name may have line breaks, or codes that a terminal obeys, or blanks at its ends, and be of
    # any length.
    plain = (name.isprintable() and name.strip() == name != "" for name in names)
    safe = (n if ok else repr(n) for n, ok in zip(names[:MOST_SHOWN], plain, strict=False))
    cut = (name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in safe)
    return (", ".join(cut) or "none") + more


def describe(examples: Examples, columns: Collection[str], **more: Any) -> Reading:
    """Return what of a data set is read.

    Args:
        examples: the examples.
        columns: names of the columns that are read.
        more: further fields of ``Reading``. ``unread_columns`` are added to the other columns, and
            ``notes`` to those about the files.
    """
    notes = (missing_files(examples), rows_left_out(examples), *more.pop("notes", ()))
    unread = tuple(name for name in examples.names.columns if name not in columns)
    unread += more.pop("unread_columns", ())
    if len(unread) > MOST_RECORDED:
        rest = f"and {len(unread) - MOST_RECORDED:,} more"
        unread = (*unread[:MOST_RECORDED], rest)
    return Reading(
        source=examples.source,
        files=examples.shown_files,
        unread_files=examples.unread_files,
        columns=tuple(columns),
        unread_columns=unread,
        notes=tuple(filter(None, notes)),
        **more,
    )


def missing_files(examples: Examples) -> str:
    """Return a note about files of a folder that are missing by the numbers in the names of the
    others; "" if there are none, or a single file was given."""
    is_folder = Path(examples.source).expanduser().is_dir()
    if not (absent := missing_shards(examples.files) if is_folder else []):
        return ""
    return (
        f"by the names of the files that are read, {len(absent):,} more belong to them, which are "
        f"not there or empty: {shown(absent)}. Download these too, if they are meant to be read."
    )


def unread_keys(
    examples: Examples,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
) -> tuple[str, ...]:
    """Return the keys of messages, as "messages.KEY", that a chat template does not render.

    Args:
        examples: the examples.
        fields: columns that are read.
        tokenizer: tokenizer of the base.
        template: jinja text that renders chats.
    """
    if fields.kind != "messages" or template is None:
        return ()
    keys = [key for key in examples.names.message_keys if key not in READ_KEYS]
    rendered = {
        key
        for key in keys
        if names(template, key) and _changes_a_chat(key, examples, fields, tokenizer, template)
    }
    return tuple(f"{MESSAGES}.{key}" for key in keys if key not in rendered)


def _changes_a_chat(
    key: str,
    examples: Examples,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
) -> bool:
    """Return False if the first 100 examples are rendered in the same way without a key of their
    messages, though some have it. A template may have a variable of that name."""
    has_key = False
    for record in islice(examples, 100):
        messages = fields.messages(record)
        if all(message.get(key) in (None, "", []) for message in messages):
            continue
        has_key = True
        others = [{k: v for k, v in message.items() if k != key} for message in messages]
        tools = tools_of(record) if fields.has_tools else None
        try:
            texts = {render_text(tokenizer, chat, template, tools) for chat in (messages, others)}
        except ExampleError:  # it demands the key
            return True
        if len(texts) == 2:
            return True
    return not has_key


def roles_of(examples: Examples, most: int = 1000) -> list[str]:
    """Return the roles of the messages of the first examples, ``most`` of them."""
    first = (record[MESSAGES] for _, record in zip(range(most), examples, strict=False))
    return list(dict.fromkeys(message["role"] for messages in first for message in messages))


def template_source(chat_template: str | None, template: str | None, own: object) -> str:
    """Return a text that says where a chat template comes from.

    Args:
        chat_template: value of ``--chat_template``.
        template: the jinja text; None if there is none.
        own: chat template of the tokenizer; a dict from name to text if it has several.
    """
    if template is None:
        return "none, a response follows its prompt as it is"
    if chat_template is not None:
        return "--chat_template" if is_template(chat_template) else chat_template
    if isinstance(own, dict):
        name = next(name for name, text in own.items() if text == template)
        return f"the tokenizer's own, called {name}"
    return "the tokenizer's own"
