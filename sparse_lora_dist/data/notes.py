"""Notes about what of the data is not learned as the user may think: words without a token, parts
of chats that the template leaves out, roles that are not learned, answers without an end."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from typing import Any
from unicodedata import category

from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.chat import (
    TrainOn,
    backend_of,
    encode_chat,
    encode_prompt,
    render_text,
)
from sparse_lora_dist.data.examples import (
    Examples,
    quoted_cells,
    rows_of_another_template,
    text_in_place_of_arguments,
)
from sparse_lora_dist.data.fields import (
    ExampleError,
    Fields,
    has_marks,
    names,
    tools_of,
    unasked_prompt,
)
from sparse_lora_dist.data.reading import roles_of, shown

USUAL_ROLES = """
    system developer user assistant tool tool_response function ipython observation
""".split()
"""Roles of messages that everybody knows whether the model writes them."""
DATE = "strftime_now"
"""Name of the function with which a chat template gets the date."""
AT_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
"""What of jinja gives another text each time."""
MARKS = """
The {% generation %} marks of the chat template cover nothing: put them around what the assistant
says. """.replace("\n", " ").lstrip()
"""What to do if nothing is learned with a template that has marks."""


def wrong_roles(examples: Examples) -> str:
    """Return a sentence with the roles of the first examples; "" if one of them is the
    assistant."""
    roles = roles_of(examples)
    if "assistant" in roles:
        return ""
    return (
        f"Its messages have the roles {shown(roles)}, but the loss is on messages with the role "
        "'assistant' only. Rename the role of the answers to 'assistant', and that of the "
        "questions to 'user'. "
    )


def no_end(ends: Collection[str]) -> str:
    """Return a note that none of the tokens that end an answer is learned."""
    return (
        f"no token that ends an answer is learned ({shown(list(ends))}), so the model does not "
        "learn to stop. Use a --chat_template that ends each answer with such a token, within its "
        "{% generation %} marks if it has them."
    )


def not_learned(examples: Examples, template: str | None) -> str:
    """Return a note about roles other than the usual ones, whose messages are not learned; "" if
    there are none, or the template has marks around what is learned."""
    unusual = [role for role in roles_of(examples) if role not in USUAL_ROLES]
    if has_marks(template) or not unusual:
        return ""
    return (
        f"messages of the role {shown(unusual)} are rendered but not learned, since only those of "
        "the role assistant are. If the model writes them, rename the role, or give a "
        "--chat_template with {% generation %} marks."
    )


def writes_the_date(template: str | None) -> str:
    """Return a note if a chat template writes the date or something random; "" otherwise."""
    if template is not None and AT_RANDOM.search(template):
        return (
            "the chat template renders a chat differently each time (random, lipsum), so rows that "
            "are made again differ, and a resume may be refused then. Give a --chat_template "
            "without it."
        )
    if template is None or not names(template, DATE):
        return ""
    return (
        f"the chat template writes the date into each row ({DATE}), so the rows of another day "
        "differ, and a resume may be refused then. Give a --chat_template with a fixed date."
    )


def asks_unasked(tokenizer: PreTrainedTokenizerFast, template: str | None) -> str:
    """Return a note that a chat template asks for an answer after every chat; "" if it does not."""
    if template is None or not (prompt := unasked_prompt(tokenizer, template)):
        return ""
    return (
        f"the chat template writes {prompt!r} after every chat, whether it is asked to or not: "
        "this is left out where a chat ends."
    )


def words_cut(
    examples: Examples, columns: Collection[str], tokenizer: PreTrainedTokenizerFast
) -> str:
    """Return a note about words of which the tokenizer leaves out letters, since it has neither a
    token for them nor one for unknown text; "" if the first examples have none.

    Args:
        examples: the examples, of which the beginnings of the first 100 texts are looked at.
        columns: columns that are read.
        tokenizer: tokenizer of the base.
    """
    texts = (text for record in examples for text in _texts([record.get(c) for c in columns]))
    words = list(dict.fromkeys(word for text in islice(texts, 100) for word in text[:9999].split()))
    found = backend_of(tokenizer).encode_batch(words, add_special_tokens=False)
    cut = [word for word, tokens in zip(words, found, strict=True) if _misses(word, tokens.offsets)]
    if not cut:
        return ""
    return (
        f"the tokenizer leaves out letters of some words ({shown(cut)}), for which it has no "
        "token: the model does not learn them. Check that --model has the right tokenizer."
    )


def answers_cut(
    examples: Examples, fields: Fields, tokenizer: PreTrainedTokenizerFast, template: str | None
) -> str:
    """Return a note that the chat template leaves out a part of messages, as templates do with
    what a model thinks and with system prompts, or changes it; "" if it does not in the first 100
    examples. White space does not count.

    Args:
        examples: the examples.
        fields: columns that are read.
        tokenizer: tokenizer of the base.
        template: jinja text that renders chats; None if they are joined as they are.
    """
    cut: Counter[str] = Counter()
    for record in islice(examples, 100 if template is not None else 0):
        messages = fields.messages(record)
        tools = tools_of(record) if fields.has_tools else None
        chat = "".join(render_text(tokenizer, messages, template, tools).split())
        said = [(m["role"], m["content"]) for m in messages if isinstance(m["content"], str)]
        # What an earlier answer thought is left out on purpose.
        said[:-1] = [(role, text.rpartition("</think>")[2]) for role, text in said[:-1]]
        cut.update({role for role, text in said if "".join(text.split()) not in chat})
    notes = []
    if count := cut["assistant"]:
        notes.append(
            "the chat template does not write an answer as it is: it leaves out a part, such as "
            "what stands before </think>, or changes it, as |e and |tojson do, in "
            f"{count} of the first examples. The model learns what the template writes. Give a "
            "--chat_template that writes the answers as they are."
        )
    if others := [role for role in ("system", "developer", "user") if cut[role]]:
        notes.append(
            f"the chat template leaves out or changes messages of the role {shown(others)}, or a "
            f"part of them, in {max(cut[role] for role in others)} of the first examples: the "
            "model is trained with what it writes. Give a --chat_template that writes them as they "
            "are."
        )
    return " ".join(notes)


def no_document(
    examples: Examples,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    *,
    any_too_long: bool,
) -> str:
    """Return sentences that say why no example has a target, as far as it is known, and what to do.

    Args:
        examples: the examples.
        fields: columns that are read.
        tokenizer: tokenizer of the base.
        template: jinja text that renders chats; None if they are joined as they are.
        any_too_long: True if an example is left out because it is too long.
    """
    if template is not None and not _writes_messages(examples, fields, tokenizer, template):
        return (
            f"The chat template {template[:60]!r} writes none of the messages. Give a "
            "--chat_template that writes the role and content of each: {% for message in messages "
            "%} ... {{ message.role }} ... {{ message.content }} ... {% endfor %}."
        )
    why = wrong_roles(examples) if fields.kind == "messages" else ""
    if any_too_long:
        return f"{why}Raise --sequence_length, or give other data."
    if _has_no_tokens(examples, fields, tokenizer):
        return (
            "The tokenizer gives no token for any text of the data. Check that --model has the "
            "right tokenizer: the files of another may be in its folder."
        )
    return f"{why}{MARKS if has_marks(template) else ''}Give other data."


def _has_no_tokens(examples: Examples, fields: Fields, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return True if the tokenizer gives no token for any text of the first 100 examples, and one
    of them is not blank."""
    first = islice(examples, 100)
    texts = [text for record in first for text in _texts([record.get(c) for c in fields.columns])]
    texts = [text for text in texts if text.strip()]
    encoded = backend_of(tokenizer).encode_batch(texts, add_special_tokens=False)
    return bool(texts) and not any(one.ids for one in encoded)


def _writes_messages(
    examples: Examples, fields: Fields, tokenizer: PreTrainedTokenizerFast, template: str
) -> bool:
    """Return False if the chat template writes no message of the first 100 examples, as one for
    another program does. Messages without a text do not count."""
    has_text = False
    for record in islice(examples, 100):
        messages = fields.messages(record)
        tools = tools_of(record) if fields.has_tools else None
        chat = "".join(render_text(tokenizer, messages, template, tools).split())
        texts = ["".join(text.split()) for m in messages for text in _texts(m["content"])]
        if any(text and text in chat for text in texts):
            return True
        has_text = has_text or any(texts)
    return not has_text


def asked_otherwise(
    examples: Examples,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    train_on: TrainOn,
) -> str:
    """Return a note that the text with which the chat template asks for an answer is not what
    stands before what is learned of an answer; "" if it is in the first 100 examples.

    Args:
        examples: the examples.
        fields: columns that are read.
        tokenizer: tokenizer of the base.
        template: jinja text that renders chats; None if they are joined as they are.
        train_on: what is learned.
    """
    for record in islice(examples, 100 if template is not None else 0):
        messages = fields.messages(record)
        tools = tools_of(record) if fields.has_tools else None
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            continue
        with suppress(ExampleError):  # templates may refuse a chat that ends otherwise
            asked = render_text(tokenizer, messages[:-1], template, tools, asks=True)
            before = encode_prompt(tokenizer, messages[:-1], template=template, tools=tools)
            chat = encode_chat(
                tokenizer, messages, template=template, train_on=train_on, tools=tools
            )
            differs = "other text stands before the answer"
            if render_text(tokenizer, messages, template, tools).startswith(asked):
                rest = zip(chat.ids, chat.is_target, strict=True)
                unlearned = takewhile(lambda token: not token[1], islice(rest, len(before), None))
                between = str(tokenizer.decode([token for token, _ in unlearned]))
                differs = between and f"{between[-60:]!r} is not learned, which stands after it"
            if differs:
                return (
                    f"the chat template asks for an answer with {asked[-60:]!r}, but in training "
                    f"{differs}. Programs that use the model ask with it. Give a --chat_template "
                    "that writes the same in both places."
                )
    return ""


def notes_on_text(
    examples: Examples, fields: Fields, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, ...]:
    """Return the notes about the texts of data, whatever they are for."""
    columns = fields.all_columns
    notes = words_cut(examples, columns, tokenizer), quoted_cells(examples, columns)
    return tuple(filter(None, notes))


def notes_on_chats(
    examples: Examples,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    train_on: TrainOn,
) -> tuple[str, ...]:
    """Return the notes about what the chat template makes of data."""
    notes = (
        writes_the_date(template),
        asks_unasked(tokenizer, template),
        answers_cut(examples, fields, tokenizer, template),
        asked_otherwise(examples, fields, tokenizer, template, train_on),
        text_in_place_of_arguments(examples, template),
        rows_of_another_template(examples, template, tokenizer.chat_template),
    )
    return tuple(filter(None, notes))


def _misses(word: str, spans: Sequence[tuple[int, int]]) -> bool:
    """Return True if tokens stand for fewer letters than a word has. Marks and control characters
    do not count: many tokenizers drop them on purpose."""
    held = {place for span in spans for place in range(*span)}
    return len(held) < sum(category(letter)[0] not in "MCZ" for letter in word)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([part for key, part in value.items() if key != "role"])
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
