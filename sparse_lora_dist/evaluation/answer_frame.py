"""Find what a chat template puts around an answer, which is no part of the answer.

Qwen3's template, for example, puts an empty think block before it:

    <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\ncat<|im_end|>\\n

A model that was trained with it generates the block too. Users of a chat program do not see it.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.chat import asking, encode_prompt, tokens_that_end, two_answers

Item = TypeVar("Item")

MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""A mark such as <think>, </think> or [THINK]."""


@dataclass(frozen=True, kw_only=True)
class AnswerFrame:
    """What a chat template puts around an answer, as text without special tokens."""

    before: str = ""
    """Text between the prompt, as it is given to the model, and the answer."""
    after: str = ""
    """Text after the answer."""
    closing: str | None = None
    """Mark that ends the thoughts before an answer, such as </think>; None if the template has
    none."""
    before_ids: tuple[int, ...] = ()
    """Token ids of ``before``; empty if they depend on the answer."""
    after_end_ids: tuple[int, ...] = ()
    """Token ids that the template puts after the first token that ends the answer, such as a line
    break after <|im_end|>. A model never writes them."""

    def answer_in(self, text: str) -> str:
        """Return the answer in a generated text: without ``before`` and ``after``, and without
        thoughts if their closing mark is there.

        Args:
            text: text that the model generated, without special tokens.
        """
        before, after = self.before.strip(), self.after.strip()
        if before and text.lstrip().startswith(before):
            text = text.lstrip()[len(before) :].lstrip()
        elif self.closing is not None and self.closing in text:
            text = text.partition(self.closing)[2].lstrip()
        if after and text.rstrip().endswith(after):
            text = text.rstrip()[: -len(after)].rstrip()
        return text


def find_frame(tokenizer: PreTrainedTokenizerFast, template: str | None) -> AnswerFrame:
    """Return what a chat template puts around an answer.

    Two chats are rendered that differ in the answer only. What they share before and after it is
    the template's.

    Args:
        tokenizer: tokenizer of the model.
        template: jinja text that renders chats; None if prompts are used as they are.

    Raises:
        ExampleError: the template refuses a chat of one question and its answer.
    """
    if template is None:
        return AnswerFrame()
    chat = asking(tokenizer, "?", template=template)
    prompt = encode_prompt(tokenizer, chat, template=template)
    one, two = two_answers(tokenizer, chat, template=template)
    # As generated texts are decoded.
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, one, two)]
    asked, *chats = texts
    shared, after = os.path.commonprefix(chats), os.path.commonprefix([t[::-1] for t in chats])
    if chats[0] == chats[1]:  # the template renders no answer
        return AnswerFrame()
    if not shared.startswith(asked):  # the prompt alone is rendered in another way
        opened = asked[len(shared) :] if asked.startswith(shared) else ""
        return AnswerFrame(after=after[::-1], closing=_closing_of(opened))
    before = shared[len(asked) :]
    marks = MARK.findall(before)
    common = _common_start(one, two)
    shared_end = _common_start(one[::-1], two[::-1])[::-1]
    may_end = tokens_that_end(tokenizer)
    ends = [k for k, i in enumerate(shared_end) if i in may_end]
    return AnswerFrame(
        before=before,
        after=after[::-1],
        closing=marks[-1] if marks else None,
        before_ids=tuple(common[len(prompt) :]) if common[: len(prompt)] == prompt else (),
        after_end_ids=tuple(shared_end[ends[0] + 1 :]) if ends else (),
    )


def _closing_of(opened: str) -> str | None:
    """Return the mark that closes the one with which a text ends: </think> for <think>."""
    marks = MARK.findall(opened)
    if not marks or not opened.rstrip().endswith(marks[-1]):
        return None
    return f"{marks[-1][0]}/{marks[-1][1:]}"


def _common_start(one: Sequence[Item], two: Sequence[Item]) -> list[Item]:
    pairs = zip(one, two, strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
