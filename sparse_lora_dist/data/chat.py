"""Text or chat messages -> token ids, and which of them the loss is taken on."""

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import BatchEncoding, PreTrainedTokenizerFast

from sparse_lora_dist.data.fields import ExampleError, Message
from sparse_lora_dist.errors import UserError

TrainOn = Literal["response", "all"]

# As transformers recognises it; without the marks it would answer with a mask of zeros.
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids and, for each, whether it is to be learned."""

    ids: list[int]
    is_target: list[bool]


def find_template(tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> str | None:
    """The jinja text that renders chats: ``chat_template``, a file or the text, or the tokenizer's.

    Raises:
        UserError: ``chat_template`` is neither jinja text nor a file that exists.
    """
    if chat_template is None:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    if not Path(chat_template).expanduser().is_file():
        raise UserError(
            f"--chat_template {chat_template}: no such file, and no jinja text ({{{{ or {{%) either"
        )
    return Path(chat_template).expanduser().read_text(encoding="utf-8")


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The text's ids, begun with bos if this tokenizer does so and ended with eos if it has one."""
    return _framed(tokenizer, _ids(tokenizer, text)) if text.strip() else []


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    *,
    template: str | None,
    train_on: TrainOn,
) -> Encoded:
    """The rendered chat; every assistant turn is a target, with the end the template gives it.

    Without a template a single prompt and response are joined as they are and ended with eos.

    Raises:
        ExampleError: the template refuses the chat, or its response spans cannot be found.
    """
    if template is None:
        encoded = _joined(tokenizer, messages)
    elif train_on == "all":
        encoded = _whole(_render(tokenizer, messages, template)["input_ids"])
    elif GENERATION_MARK.search(template) and _covers_spaces(tokenizer):
        out = _render(tokenizer, messages, template, return_assistant_tokens_mask=True)
        encoded = Encoded(ids=out["input_ids"], is_target=[m == 1 for m in out["assistant_masks"]])
    else:
        encoded = _spans_by_prefixes(tokenizer, messages, template)
    return _whole(encoded.ids) if train_on == "all" else encoded


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], *, template: str | None
) -> list[int]:
    """The ids after which the model is to answer, as ``encode_chat`` has them before a response.

    Raises:
        ExampleError: the template refuses the chat.
    """
    if template is None:
        if len(messages) > 1:
            raise ExampleError("a chat needs a template; give one with --chat_template")
        ids = _framed(tokenizer, _ids(tokenizer, messages[0]["content"]), ends=False)
    else:
        ids = _render(tokenizer, messages, template, add_generation_prompt=True)["input_ids"]
    if not ids:
        raise ExampleError("its prompt is empty")
    return ids


def encode_answer(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    answer: str,
    *,
    before: list[int],
    template: str | None,
) -> Encoded:
    """The chat with this answer after it, of which all that the answer adds is a target, the end of
    its turn included. ``before``: the chat without it, as ``encode_prompt`` has it.

    Raises:
        ExampleError: the template refuses the chat, or renders what comes before otherwise once an
            answer follows; or the answer adds nothing.
    """
    chat = [*messages, {"role": "assistant", "content": answer}]
    ids = encode_chat(tokenizer, chat, template=template, train_on="all").ids
    if ids[: len(before)] != before:
        raise ExampleError(
            "the chat template renders the prompt otherwise once an answer follows it, so answers "
            "have no likelihood. Give another --chat_template, or let the model answer: "
            "choice_generated"
        )
    if len(ids) == len(before):
        raise ExampleError(f"the choice {answer!r} becomes no token")
    return Encoded(ids=ids, is_target=[i >= len(before) for i in range(len(ids))])


def end_of_turn(tokenizer: PreTrainedTokenizerFast, *, template: str | None) -> set[int]:
    """The ids that end a response: eos, and the special tokens that come after it.

    Raises:
        ExampleError: the template refuses a question and its answer.
    """
    user = {"role": "user", "content": "a"}
    one, two = (
        encode_chat(
            tokenizer,
            [user, {"role": "assistant", "content": answer}],
            template=template,
            train_on="all",
        ).ids
        for answer in "ab"
    )
    # What two renderings that differ in the answer alone have in common at their ends.
    pairs = zip(reversed(one), reversed(two), strict=False)
    end = {i for i, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)} if one != two else set()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    eos = tokenizer.eos_token_id
    return (end & special) | (set() if eos is None else {int(eos)})


def _whole(ids: list[int]) -> Encoded:
    return Encoded(ids=ids, is_target=[True] * len(ids))


def _covers_spaces(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Do token offsets leave no character out?

    Where they do (``trim_offsets``), transformers finds no token at a mark next to a space, and
    drops the turn or takes all that follows for a target. Prefixes need no offsets.
    """
    encoded = tokenizer(" a ", add_special_tokens=False)
    return all(encoded.char_to_token(0, i) is not None for i in range(3))


def _joined(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Encoded:
    prompt, response = (_ids(tokenizer, m["content"]) for m in messages)
    ids = _framed(tokenizer, prompt + response)
    num_before = len(_framed(tokenizer, prompt, ends=False))
    return Encoded(ids=ids, is_target=[i >= num_before for i in range(len(ids))])


def _spans_by_prefixes(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], template: str
) -> Encoded:
    """An assistant turn is what it adds to the chat before it and the generation prompt."""
    ids = _render(tokenizer, messages, template)["input_ids"]
    is_target = [False] * len(ids)
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if k == 0:
            raise ExampleError(_no_span(1, "the chat begins with it"))
        before = _render(tokenizer, messages[:k], template, add_generation_prompt=True)["input_ids"]
        is_last = k + 1 == len(messages)
        upto = ids if is_last else _render(tokenizer, messages[: k + 1], template)["input_ids"]
        if upto[: len(before)] != before or ids[: len(upto)] != upto:
            raise ExampleError(_no_span(k + 1, "the chat up to it is no token prefix of the whole"))
        is_target[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return Encoded(ids=ids, is_target=is_target)


def _no_span(number: int, why: str) -> str:
    return (
        f"cannot tell which tokens message {number} (assistant) became: {why}. Give a "
        "--chat_template with {% generation %} marks around assistant turns, or set --train_on all"
    )


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], template: str, **options: Any
) -> dict[str, Any]:
    # It adds no special tokens of its own: bos and eos come from the template, so never twice.
    try:
        out = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, **options
        )
    except jinja2.TemplateError as error:
        raise ExampleError(f"the chat template refuses it: {error}") from error
    assert isinstance(out, BatchEncoding)
    return dict(out)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    # verbose=False: a text longer than the model's window is cut later, so no warning is due.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _framed(tokenizer: PreTrainedTokenizerFast, ids: list[int], *, ends: bool = True) -> list[int]:
    """``ids`` with bos and eos, neither of them twice."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts_with_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    before = [bos] if starts_with_bos and ids[:1] != [bos] else []
    after = [eos] if ends and eos is not None and ids[-1:] != [eos] else []
    return before + ids + after
