"""Tokenise text and chat messages, and mark the tokens that have a loss (the targets).

A turn is one message of a chat. A template is the jinja text with which transformers renders a chat
as one string; without one, a chat must be one prompt and its response, which are joined as they
are. bos and eos are the tokenizer's tokens for the beginning and end of a sequence.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, takewhile
from typing import Any, Literal

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.fields import (
    BEGIN,
    END,
    ExampleError,
    Message,
    Tools,
    has_marks,
    unasked_prompt,
    with_signs,
)
from sparse_lora_dist.data.read_files import plainly

TrainOn = Literal["response", "all"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The tokens of an example, and which of them are targets."""

    ids: list[int]
    """Token ids."""
    is_target: list[bool]
    """One entry for each token: True if it has a loss."""


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the token ids of a plain text, or [] if it is only white space.

    bos is added if the tokenizer adds one to texts, and eos if the tokenizer has one.
    """
    return _framed(tokenizer, _ids(tokenizer, text)) if text.strip() else []


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    *,
    template: str | None,
    train_on: TrainOn,
    tools: Tools = None,
) -> Encoded:
    """Tokenise a chat. The targets are the assistant turns, including the tokens with which the
    template ends them, or all tokens.

    Args:
        tokenizer: tokenizer of the model.
        messages: the chat, dicts with the keys "role" and "content"; without a template exactly one
            prompt and its response.
        template: jinja text that renders the chat; None joins prompt and response as they are, with
            bos and eos as ``encode_text`` adds them.
        train_on: "response" makes only assistant turns targets, "all" every token.
        tools: functions that the model may call, which the template renders.

    Returns:
        The token ids of the whole chat, with True for each token that is a target.

    Raises:
        ExampleError: the template refuses the chat, or the tokens of an assistant turn cannot be
            found.
    """
    if template is None:
        encoded = _joined(tokenizer, messages)
    elif train_on == "all":
        encoded = _whole(_rendered(tokenizer, messages, template, tools))
    elif has_marks(template):
        encoded = _spans_by_marks(tokenizer, messages, template, tools)
    else:
        encoded = _spans_by_prefixes(tokenizer, messages, template, tools)
    return _whole(encoded.ids) if train_on == "all" else encoded


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    *,
    template: str | None,
    tools: Tools = None,
) -> list[int]:
    """Return the token ids of a prompt, ready for the model to generate the answer: the ids that
    ``encode_chat`` puts before a response.

    Args:
        tokenizer: tokenizer of the model.
        messages: the chat without the answer, dicts with the keys "role" and "content".
        template: jinja text that renders the chat; None if the only message is used as it is.
        tools: functions that the model may call, which the template renders.

    Raises:
        ExampleError: the template refuses the chat, there are several messages and no template, or
            the prompt has no tokens.
    """
    if template is None:
        if len(messages) > 1:
            raise ExampleError(
                "This chat has several turns, but the tokenizer has no chat template. Give one "
                "with --chat_template."
            )
        ids = _framed(tokenizer, _ids(tokenizer, messages[0]["content"]), ends=False)
    else:
        ids = _rendered(tokenizer, messages, template, tools, asks=True)
    if not ids:
        raise ExampleError("The prompt of this example is empty. Give it a text.")
    return ids


def encode_answer(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    answer: str,
    *,
    before: list[int],
    template: str | None,
    tools: Tools = None,
) -> Encoded:
    """Tokenise a chat with an answer, to compute the likelihood of the answer. The targets are the
    tokens that the answer adds, including those that end its turn.

    Args:
        tokenizer: tokenizer of the model.
        messages: the chat without the answer, dicts with the keys "role" and "content".
        answer: text of the answer.
        before: token ids of ``messages``, from ``encode_prompt``.
        template: jinja text that renders the chat; None if the only message is used as it is.
        tools: functions that the model may call, which the template renders.

    Returns:
        The token ids of ``messages`` and answer, with True for each token that the answer adds.

    Raises:
        ExampleError: the template refuses the chat, renders the prompt differently when an answer
            follows, or the answer adds no token.
    """
    chat = [*messages, {"role": "assistant", "content": answer}]
    ids = encode_chat(tokenizer, chat, template=template, train_on="all", tools=tools).ids
    if ids[: len(before)] != before:
        raise ExampleError(
            "The chat template renders the prompt differently when an answer follows it, so the "
            "likelihood of an answer cannot be computed. Give another --chat_template, or score "
            "generated answers with --metrics choice_generated."
        )
    if len(ids) == len(before):
        raise ExampleError(f"The answer {answer!r} has no tokens. Give it a text.")
    return Encoded(ids=ids, is_target=[i >= len(before) for i in range(len(ids))])


def end_of_turn(tokenizer: PreTrainedTokenizerFast, *, template: str | None) -> set[int]:
    """Return the ids of the tokens that end a response, at which generation stops: eos, and the
    special tokens that the template puts after a response. If these are none, they are the tokens
    there that were added to the vocabulary and are not marked as special.

    Args:
        tokenizer: tokenizer of the model.
        template: jinja text that renders chats; None if prompts are used as they are.

    Raises:
        ExampleError: the template refuses a chat of one question and its answer.
    """
    one, two = two_answers(tokenizer, asking(tokenizer, "a", template=template), template=template)
    # The common end of two renderings that differ in the answer only.
    pairs = zip(reversed(one), reversed(two), strict=False)
    end = {i for i, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)} if one != two else set()
    eos = tokenizer.eos_token_id
    found = end & tokens_that_end(tokenizer) or end & {*tokenizer.added_tokens_decoder}
    return found | (set() if eos is None else {int(eos)})


def tokens_that_end(tokenizer: PreTrainedTokenizerFast) -> set[int | None]:
    """Return the ids of tokens that may end a response: eos, and all special tokens."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*special, tokenizer.eos_token_id}


def asking(
    tokenizer: PreTrainedTokenizerFast, question: str, *, template: str | None
) -> list[Message]:
    """Return a chat of one question that the template renders with an answer: with a system prompt
    if it demands one.

    Args:
        tokenizer: tokenizer of the model.
        question: content of the message.
        template: jinja text that renders chats; None if prompts are used as they are.
    """
    user: Message = {"role": "user", "content": question}
    try:
        two_answers(tokenizer, [user], template=template)
    except ExampleError:
        return [{"role": "system", "content": question}, user]
    return [user]


def two_answers(
    tokenizer: PreTrainedTokenizerFast, chat: list[Message], *, template: str | None
) -> tuple[list[int], list[int]]:
    """Return the token ids of two chats that differ in the answer only: what they share is the
    template's.

    Args:
        tokenizer: tokenizer of the model.
        chat: messages before the answer.
        template: jinja text that renders chats; None joins question and answer as they are.

    Raises:
        ExampleError: the template refuses these messages with an answer.
    """
    one, two = (
        encode_chat(
            tokenizer,
            [*chat, {"role": "assistant", "content": answer}],
            template=template,
            train_on="all",
        ).ids
        for answer in _two_words(tokenizer)
    )
    return one, two


@lru_cache(maxsize=1)
def _two_words(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """Return two words whose tokens differ and are none for unknown text: "a" and "b", or what a
    vocabulary without these has, such as one of amino acids."""

    def is_known(word: str) -> bool:
        ids = _ids(tokenizer, word)
        return ids != [] and tokenizer.unk_token_id not in ids

    if is_known("a") and is_known("b"):
        return "a", "b"
    words = {word for word in tokenizer.get_vocab() if word.isalnum()}
    others = sorted(words - {*tokenizer.all_special_tokens})
    one, two = [*islice(filter(is_known, others), 2), "a", "b"][:2]
    return one, two


def _whole(ids: list[int]) -> Encoded:
    return Encoded(ids=ids, is_target=[True] * len(ids))


def _joined(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Encoded:
    prompt, response = (m["content"] for m in messages)
    before = _ids(tokenizer, prompt)
    ids = _framed(tokenizer, before + _continuation(tokenizer, prompt, response))
    num_before = len(_framed(tokenizer, before, ends=False))
    return Encoded(ids=ids, is_target=[i >= num_before for i in range(len(ids))])


def _continuation(tokenizer: PreTrainedTokenizerFast, before: str, text: str) -> list[int]:
    """Return the tokens of ``text`` as it follows ``before``.

    A tokenizer such as Llama 2's puts a space before each text, so the tokens of ``text`` alone
    would begin with a space that is not there.
    """

    def after(other: str) -> list[int]:
        start, whole = _ids(tokenizer, other), _ids(tokenizer, other + text)
        return whole[len(start) :] if whole[: len(start)] == start else []

    alone = _ids(tokenizer, text)
    if not _puts_a_space_before(tokenizer):
        return alone
    # A token may reach from ``before`` into ``text``; no token reaches over a line break.
    return after(before) or after("\n") or alone


def _puts_a_space_before(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return True if the tokens of a text begin with a space that the text does not have."""
    apart, together = _ids(tokenizer, "a") + _ids(tokenizer, "b"), _ids(tokenizer, "ab")
    return bool(tokenizer.decode(apart) != tokenizer.decode(together))


def _spans_by_marks(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], template: str, tools: Tools
) -> Encoded:
    """Tokenise a chat whose template has {% generation %} marks. A token is a target if it lies
    between them, or has a character there that is no white space: special tokens of some
    tokenizers, such as Phi-3's <|assistant|>, take the white space beside them.

    transformers makes such a mask too, but takes a mark at a character that no token begins or
    ends with (of an emoji, or one that is normalised), and one at the first token, for another. It
    also takes places in the block that is being rendered, such as {% set %}, for places in the
    chat.
    """
    text, spans = _between_marks(tokenizer, messages, template, tools)
    encoded = backend_of(tokenizer).encode(text, add_special_tokens=False)

    def is_learned(first: int, last: int, start: int, stop: int) -> bool:
        if start <= first and last <= stop:
            return start < last and first < stop
        return text[max(first, start) : min(last, stop)].strip() != ""

    is_target = [any(is_learned(*token, *span) for span in spans) for token in encoded.offsets]
    return Encoded(ids=encoded.ids, is_target=is_target)


def _between_marks(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], template: str, tools: Tools
) -> tuple[str, list[tuple[int, int]]]:
    """Return a rendered chat, and where the text between marks begins and ends in it.

    The chat is rendered once more with a template that writes ``BEGIN`` and ``END`` at its marks.
    """
    text = render_text(tokenizer, messages, template, tools)
    signed = render_text(tokenizer, messages, with_signs(template), tools)
    parts = re.split(f"([{BEGIN}{END}])", signed)
    if "".join(parts[::2]) != text:
        raise ExampleError(
            "What stands between the {% generation %} marks of the chat template cannot be found, "
            "because the template changes that text after it was rendered, or renders a chat "
            "differently each time. Give another --chat_template, or set --train_on all."
        )
    spans, place, depth = [], 0, 0
    for part, sign in zip(parts[::2], [*parts[1::2], END], strict=True):
        if depth > 0 and part:
            spans.append((place, place + len(part)))
        place += len(part)
        depth += 1 if sign == BEGIN else -1
    return text, spans


@lru_cache(maxsize=1)
def backend_of(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of a tokenizer that neither cuts nor pads, as a tokenizer.json may have it, and
    whose offsets (from each token to its characters) cover spaces too. With ``trim_offsets``, as
    many byte-level tokenizers have it, they do not."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["truncation"] = described["padding"] = None
    _do_not_trim(described["post_processor"])
    copy = Tokenizer.from_str(json.dumps(described))
    copy.encode_special_tokens = tokenizer.split_special_tokens
    return copy


def _do_not_trim(processor: Any) -> None:
    parts = processor.get("processors", []) if isinstance(processor, dict) else []
    for part in parts:
        _do_not_trim(part)
    if isinstance(processor, dict) and "trim_offsets" in processor:
        processor["trim_offsets"] = False


def _spans_by_prefixes(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], template: str, tools: Tools
) -> Encoded:
    """Tokenise a chat, and find the tokens of each assistant turn by rendering parts of the chat.

    For each assistant turn, two parts of the chat are rendered: the messages before the turn,
    followed by the generation prompt (``add_generation_prompt=True``); and the messages up to the
    end of the turn. The second rendering must begin with the tokens of the first. All its further
    tokens belong to the turn, and are targets.
    """

    def rendered(part: list[Message], *, asks: bool = False) -> list[int]:
        return _rendered(tokenizer, part, template, tools, asks=asks)

    ids = rendered(messages)
    is_target = [False] * len(ids)
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if k == 0:
            raise ExampleError(_no_span(1, "no message comes before it"))
        before = rendered(messages[:k], asks=True)
        is_last = k + 1 == len(messages)
        upto = ids if is_last else rendered(messages[: k + 1])
        if upto[: len(before)] != before or ids[: len(upto)] != upto:
            raise ExampleError(
                _no_span(
                    k + 1,
                    "the tokens of the chat up to it are not the first tokens of the whole chat",
                )
            )
        is_target[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return Encoded(ids=ids, is_target=is_target)


def _no_span(number: int, why: str) -> str:
    return (
        f"The tokens of message {number} (of the assistant) cannot be found, because {why}. Give a "
        "--chat_template with {% generation %} marks around assistant turns, or set --train_on all."
    )


def _rendered(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    template: str,
    tools: Tools = None,
    *,
    asks: bool = False,
) -> list[int]:
    # No special tokens are added: bos and eos come from the template only.
    return _ids(tokenizer, render_text(tokenizer, messages, template, tools, asks=asks))


@contextmanager
def _refusals_of_a_template() -> Iterator[None]:
    """Context manager that turns what a chat template raises into an ExampleError. A template is a
    program: it can raise anything."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, jinja2.TemplateError) else plainly(error)
        raise ExampleError(
            f"The chat template refuses this chat: {text.rstrip('.')}. Correct the chat, or give "
            "another --chat_template."
        ) from error


def render_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    template: str | None,
    tools: Tools = None,
    *,
    asks: bool = False,
) -> str:
    """Return a chat as the text that a template writes, without a generation prompt that it writes
    unasked.

    Args:
        tokenizer: tokenizer of the model.
        messages: the chat.
        template: jinja text that renders the chat.
        tools: functions that the model may call, which the template renders.
        asks: True to add what the template writes for the model to answer next.

    Raises:
        ExampleError: the template refuses the chat.
    """
    with _refusals_of_a_template():
        text = str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=asks,
            )
        )
    unasked = "" if asks or template is None else unasked_prompt(tokenizer, template)
    return text.removesuffix(unasked)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    # verbose=False: no warning for a text longer than the model's window, as it is cut later.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _framed(tokenizer: PreTrainedTokenizerFast, ids: list[int], *, ends: bool = True) -> list[int]:
    """Add to ``ids`` the special tokens that the tokenizer puts around a text, and eos at the end,
    unless they are there already or the tokenizer has none.

    Args:
        tokenizer: tokenizer of the model.
        ids: token ids of a text.
        ends: True to end the text; False for a prompt that an answer follows.
    """
    eos = tokenizer.eos_token_id
    before, after = _around_a_text(tokenizer)
    ids = ids if ids[: len(before)] == before else before + ids
    if not ends or (eos is not None and ids[-1:] == [eos]):
        return ids
    ids = ids if after == ids[len(ids) - len(after) :] else ids + after
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


@lru_cache(maxsize=1)
def _around_a_text(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that a tokenizer puts before a text, such as bos or
    [gMASK]<sop>, and after it."""
    text, whole = _ids(tokenizer, "a"), tokenizer("a").input_ids
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return [], []
