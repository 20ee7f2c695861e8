"""Examples -> what a model is asked: tokens to score, or a prompt and which answers are right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import NOT_A_TARGET, Document, Documents, load_documents
from sparse_lora_dist.data.chat import encode_answer, encode_prompt
from sparse_lora_dist.data.fields import MESSAGES, ExampleError, Message
from sparse_lora_dist.evaluation.examples import Table, TooLong
from sparse_lora_dist.evaluation.right_answers import (
    LETTERS,
    chosen,
    final_number,
    is_exact,
    is_same_number,
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One question, answered in each way there is."""

    documents: list[Document]
    right: int


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """One prompt, and whether the text that follows it is right."""

    prompt: list[int]
    is_right: Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Text -> tokens, as in training."""

    tokenizer: PreTrainedTokenizerFast
    template: str | None
    data: DataConfig

    def prompt(self, messages: list[Message]) -> list[int]:
        """What comes before an answer."""
        return self._fitting(encode_prompt(self.tokenizer, messages, template=self.template))

    def answered(self, messages: list[Message], answers: Sequence[str]) -> list[Document]:
        """The chat with each answer, of which the answer alone is scored, its end included."""
        before, found = self.prompt(messages), []
        for answer in answers:
            encoded = encode_answer(
                self.tokenizer, messages, answer, before=before, template=self.template
            )
            ids = np.array(self._fitting(encoded.ids))
            labels = np.where(encoded.is_target, ids, NOT_A_TARGET)
            found.append(Document(input_ids=ids, labels=labels))
        return found

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) > self.data.sequence_length:
            raise TooLong(len(ids), self.data.sequence_length)
        return ids


def documents(encoder: Encoder, table: Table, limit: int | None) -> Documents:
    """As training has them for its held-out loss, tokens and mask."""
    data, there = encoder.data, set(table.examples.table.column_names)
    as_trained = {data.prompt_field, data.response_field} <= there
    if not (as_trained or there & {MESSAGES, data.text_field} or table.examples.is_plain_text):
        columns = table.column("prompt"), table.column("response")
        data = replace(data, prompt_field=columns[0], response_field=columns[1])
    return load_documents(
        table.examples.source,
        encoder.tokenizer,
        text_field=data.text_field,
        prompt_field=data.prompt_field,
        response_field=data.response_field,
        chat_template=data.chat_template,
        train_on=data.train_on,
        sequence_length=data.sequence_length,
        max_samples=limit,
        column_names=data.column_names,
        flag="--eval_data",
        split="test",
    )


def choice(encoder: Encoder, table: Table, record: Mapping[str, Any]) -> Choice:
    """By likelihood."""
    texts, right = table.choices(record)
    messages = table.messages(record)
    return Choice(documents=encoder.answered(messages, texts), right=right)


def choice_generated(encoder: Encoder, table: Table, record: Mapping[str, Any]) -> Prompted:
    """By what the model says when the choices stand under the question, each with a letter."""
    texts, right = table.choices(record)
    *before, last = table.messages(record)
    if len(texts) > len(LETTERS):
        raise ExampleError(f"it has {len(texts)} choices, more than there are letters")
    listed = [last["content"], *(f"{a}. {text}" for a, text in zip(LETTERS, texts, strict=False))]
    prompt = encoder.prompt([*before, last | {"content": "\n".join(listed)}])
    return Prompted(prompt=prompt, is_right=lambda text: chosen(text, texts) == right)


def exact(encoder: Encoder, table: Table, record: Mapping[str, Any]) -> Prompted:
    """By the whole text."""
    prompt = encoder.prompt(table.messages(record))
    return Prompted(prompt=prompt, is_right=partial(is_exact, answer=table.reference(record)))


def gsm8k(encoder: Encoder, table: Table, record: Mapping[str, Any]) -> Prompted:
    """By the final number."""
    answer = table.reference(record)
    if final_number(answer) is None:
        raise ExampleError(f"its answer holds no number: {answer[-40:]!r}")
    prompt = encoder.prompt(table.messages(record))
    return Prompted(prompt=prompt, is_right=partial(is_same_number, answer=answer))
