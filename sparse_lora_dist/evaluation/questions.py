"""Tokenises evaluation examples.

An example becomes a text whose loss is computed, or a prompt with a function that checks the text
that the model generates after it. ``choice``, ``choice_generated``, ``exact`` and ``gsm8k`` encode
one example of the metric of that name, and raise ExampleError if it is wrong or too long.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import NOT_A_TARGET, Document, Documents, load_documents
from sparse_lora_dist.data.chat import encode_answer, encode_prompt
from sparse_lora_dist.data.fields import ExampleError, Message, Tools
from sparse_lora_dist.evaluation.answer_frame import AnswerFrame
from sparse_lora_dist.evaluation.examples import ExampleTooLong, Table
from sparse_lora_dist.evaluation.right_answers import (
    LETTERS,
    chosen_index,
    final_number,
    is_exact,
    is_same_number,
    reference_number,
)


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """A tokenised question with several answers to choose from."""

    documents: list[Document]
    """The chat with each choice as its answer; only the answer's tokens are scored."""
    right: int
    """Index of the right choice."""


@dataclass(frozen=True, kw_only=True)
class GeneratedQuestion:
    """A tokenised question that the model answers with generated text."""

    prompt: list[int]
    """Token ids of the chat up to the answer."""
    is_right: Callable[[str], bool]
    """(the answer in the generated text) -> True if it is right."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns chats into token ids with the same template and limits as training.

    Its methods raise ExampleTooLong if a chat has more tokens than --sequence_length.
    """

    tokenizer: PreTrainedTokenizerFast
    """The base's tokenizer."""
    template: str | None
    """Text of the Jinja chat template; None for plain text."""
    data: DataConfig
    """Data options of the evaluation."""
    frame: AnswerFrame = AnswerFrame()
    """What the template puts around an answer."""

    def reference(self, table: Table, record: Mapping[str, Any]) -> str:
        """Return the right answer of an example as a generated text is seen: without special tokens
        and without what the template puts around it."""
        text = table.reference(record)
        for token in self.tokenizer.added_tokens_decoder.values():
            text = text.replace(token.content, "") if token.special else text
        return self.frame.answer_in(text)

    def prompt(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Encode a chat up to the answer.

        Args:
            messages: The chat's messages, each with "role" and "content", without the answer.
            tools: Functions that the model may call.

        Returns:
            Token ids of the chat and of what the template puts before an assistant's message.
        """
        ids = encode_prompt(self.tokenizer, messages, template=self.template, tools=tools)
        return self._check_length(ids)

    def with_answers(
        self, messages: list[Message], answers: Sequence[str], tools: Tools = None
    ) -> list[Document]:
        """Encode a chat once with each of several answers.

        Args:
            messages: The chat up to the answer.
            answers: Texts of the answers.
            tools: Functions that the model may call.

        Returns:
            One document, i.e. token ids and labels, per answer. The labels score the tokens of the
            answer and the token that ends the assistant's turn, and no others: none that the
            template puts before every answer, or after that token.

        Raises:
            ExampleError: An answer has no tokens of its own, such as a space without width that
                the tokenizer drops, or its likelihood cannot be computed.
        """
        before, found = self.prompt(messages, tools), []
        framed = [*before, *self.frame.before_ids]
        encode = partial(
            encode_answer,
            self.tokenizer,
            messages,
            before=before,
            template=self.template,
            tools=tools,
        )
        without: list[int] | None = None
        with suppress(ExampleError):  # nothing is added, or the template takes no empty answer
            without = encode("").ids
        for answer in answers:
            encoded = encode(answer)
            ids = np.array(self._check_length(encoded.ids))
            labels = np.where(encoded.is_target, ids, NOT_A_TARGET)
            if encoded.ids[: len(framed)] == framed:
                labels[: len(framed)] = NOT_A_TARGET
            if (count := len(self.frame.after_end_ids)) and (
                tuple(encoded.ids[-count:]) == self.frame.after_end_ids
            ):
                labels[-count:] = NOT_A_TARGET
            if encoded.ids == without or (labels == NOT_A_TARGET).all():
                raise ExampleError(f"The answer {answer!r} has no tokens. Give it a text.")
            found.append(Document(input_ids=ids, labels=labels))
        return found

    def _check_length(self, ids: list[int]) -> list[int]:
        if len(ids) > self.data.sequence_length:
            raise ExampleTooLong(len(ids), self.data.sequence_length)
        return ids


def documents(encoder: Encoder, table: Table, limit: int | None) -> Documents:
    """Encode the examples of metric ``loss`` in the same way as training encodes held-out data.

    Args:
        encoder: Tokenizer, template and data options.
        table: The examples.
        limit: Largest number of examples to use, from the first on; None for all.

    Returns:
        The tokenised examples. Those that are too long or have no token to score are left out and
        counted.
    """
    data, columns = encoder.data, set(table.examples.names.columns)
    as_trained = table.has_chats or {data.prompt_field, data.response_field} <= columns
    if not (as_trained or data.text_field in columns or table.examples.is_plain_text):
        # Training has no default columns "question" and "answer"; name them for it.
        prompt, response = table.column("prompt"), table.column("response")
        data = replace(data, prompt_field=prompt, response_field=response)
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


def choice(encoder: Encoder, table: Table, record: Mapping[str, Any]) -> MultipleChoice:
    """Encode an example of metric ``choice``, which compares the losses of the choices.

    Args:
        encoder: Turns chats into token ids.
        table: The evaluation data, whose methods read the fields of an example.
        record: The example, as a mapping from column names to values.

    Returns:
        The chat, tokenised once with each choice as its answer.
    """
    texts, right = table.choices(record)
    documents = encoder.with_answers(table.messages(record), texts, table.tools(record))
    return MultipleChoice(documents=documents, right=right)


def choice_generated(
    encoder: Encoder, table: Table, record: Mapping[str, Any]
) -> GeneratedQuestion:
    """Encode an example of metric ``choice_generated`` as a prompt that lists the choices.

    The last message becomes e.g. "The sky is?\\nA. blue\\nB. green". A generated text is right if
    ``chosen_index`` finds the right choice in it.

    Args:
        encoder: Turns chats into token ids.
        table: The evaluation data, whose methods read the fields of an example.
        record: The example, as a mapping from column names to values.

    Raises:
        ExampleError: The example is wrong, or has more choices than there are letters.
    """
    texts, right = table.choices(record)
    *before, last = table.messages(record)
    if len(texts) > len(LETTERS):
        raise ExampleError(
            f"The example has {len(texts)} choices, but choice_generated allows at most "
            f"{len(LETTERS)}. Evaluate it with --metrics choice."
        )
    listed = [last["content"], *(f"{a}. {text}" for a, text in zip(LETTERS, texts, strict=False))]
    messages = [*before, last | {"content": "\n".join(listed)}]
    prompt = encoder.prompt(messages, table.tools(record))
    return GeneratedQuestion(
        prompt=prompt,
        is_right=lambda text: (
            (chosen := chosen_index(text, texts)) is not None and texts[chosen] == texts[right]
        ),
    )


def exact(encoder: Encoder, table: Table, record: Mapping[str, Any]) -> GeneratedQuestion:
    """Encode an example of metric ``exact`` as a prompt.

    A generated text is right if it equals the answer, ignoring case and amounts of white space.

    Args:
        encoder: Turns chats into token ids.
        table: The evaluation data, whose methods read the fields of an example.
        record: The example, as a mapping from column names to values.
    """
    prompt = encoder.prompt(table.messages(record), table.tools(record))
    answer = encoder.reference(table, record)
    return GeneratedQuestion(prompt=prompt, is_right=partial(is_exact, answer=answer))


def gsm8k(encoder: Encoder, table: Table, record: Mapping[str, Any]) -> GeneratedQuestion:
    """Encode an example of metric ``gsm8k`` as a prompt.

    A generated text is right if its final number equals the answer's (see ``final_number``).

    Args:
        encoder: Turns chats into token ids.
        table: The evaluation data, whose methods read the fields of an example.
        record: The example, as a mapping from column names to values.

    Raises:
        ExampleError: The answer has no plain number, or the example is wrong or too long.
    """
    answer = encoder.reference(table, record)
    if reference_number(answer) is None:
        what = "has no number" if final_number(answer) is None else "is no plain number"
        raise ExampleError(
            f"The example's answer {what}: {answer[-40:]!r}. Give a number such as 1,234.5, not a "
            "fraction, root, power or range, or choose other --metrics than gsm8k."
        )
    prompt = encoder.prompt(table.messages(record), table.tools(record))
    return GeneratedQuestion(prompt=prompt, is_right=partial(is_same_number, answer=answer))
