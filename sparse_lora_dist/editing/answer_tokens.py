"""Predicts the tokens of given answers with a sharded model, and generates texts greedily.

Shapes: M number of rows of a batch, T number of tokens of its longest row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.editing.edits import Question
from sparse_lora_dist.runtime.batches_over_ranks import in_batches
from sparse_lora_dist.zero3.engine import Engine


@dataclass(frozen=True, kw_only=True)
class EncodedQuestion:
    """A question and its answer as one row of token ids."""

    ids: list[int]
    """Token ids of the prompt and its answer."""
    num_prompt: int
    """Number of tokens before the first token of the answer."""

    @property
    def answer(self) -> list[int]:
        """Token ids of the answer."""
        return self.ids[self.num_prompt :]


def encode(tokenizer: Any, question: Question) -> EncodedQuestion:
    """Tokenise a question and its answer, and find where the answer starts. They are joined by a
    space unless the prompt ends or the answer begins with white space; EasyEdit adds one there too.

    The answer starts at the first token in which "prompt answer" differs from "prompt" alone.
    EasyEdit lets it start after as many tokens as the prompt alone has. The results differ only if
    the answer changes the prompt's last token, e.g. where "on" + " to" becomes one token.

    Args:
        tokenizer: The model's tokenizer. If it adds bos to every text, bos is kept; eos is removed.
        question: Prompt and answer.

    Returns:
        The token ids, with at least one token before the answer and one in it.
    """
    prompt = ids_without_eos(tokenizer, question.prompt)
    has_space = question.prompt[-1:].isspace() or question.answer[:1].isspace()
    between = "" if has_space else " "
    ids = ids_without_eos(tokenizer, f"{question.prompt}{between}{question.answer}")
    pairs = zip(prompt, ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))
    return EncodedQuestion(ids=ids, num_prompt=max(1, min(same, len(ids) - 1)))


def ids_without_eos(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without the eos that some tokenizers append."""
    ids: list[int] = tokenizer(text).input_ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


@dataclass(frozen=True, kw_only=True)
class GreedyDecoder:
    """Predicts the likeliest tokens with a trained model. Every method is collective.

    All ranks pass the same arguments and get the same results. The results do not depend on the
    number of ranks.
    """

    engine: Engine
    """Engine of the model."""
    tokenizer: Any
    """Encodes prompts and decodes generated texts."""
    pad_id: int
    """Token id that rows are padded with."""
    batch_size: int
    """Number of questions or prompts in one batch, which one rank computes."""

    def predicted_answers(self, questions: Sequence[EncodedQuestion]) -> list[list[int]]:
        """Predict each token of each answer, given the answer's tokens before it. Collective.

        Args:
            questions: Tokenised questions with the answers to predict.

        Returns:
            One list per question: the likeliest token id at each position of its answer (teacher
            forcing).
        """

        def of_batch(batch: Sequence[EncodedQuestion]) -> list[list[int]]:
            predicted_MT = self._argmax([q.ids for q in batch])
            # The logits at position t predict token t + 1.
            spans = [slice(q.num_prompt - 1, len(q.ids) - 1) for q in batch]
            return [row[span].tolist() for row, span in zip(predicted_MT, spans, strict=True)]

        with self.engine.evaluating():
            return in_batches(questions, self.batch_size, of_batch, name="questions")

    def generate(self, prompts: Sequence[str], num_tokens: int) -> list[str]:
        """Continue each prompt greedily by ``num_tokens`` tokens, ignoring eos. Collective.

        No key-value cache is used: under ZeRO-3 most of a forward's time goes into gathering the
        weights, which a cache would not shorten.

        Args:
            prompts: Texts to continue.
            num_tokens: Number of tokens to add to each prompt.

        Returns:
            The text of each prompt with its continuation, without special tokens.
        """

        def of_batch(batch: Sequence[list[int]]) -> list[str]:
            rows = [list(ids) for ids in batch]
            for _ in range(num_tokens):
                predicted_MT = self._argmax(rows)
                for row, predicted_T in zip(rows, predicted_MT, strict=True):
                    row.append(int(predicted_T[len(row) - 1]))
            return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

        with self.engine.evaluating():
            encoded = [ids_without_eos(self.tokenizer, prompt) for prompt in prompts]
            return in_batches(encoded, self.batch_size, of_batch, name="texts")

    def _argmax(self, rows: Sequence[list[int]]) -> Tensor:
        """Return the likeliest next token after each token of each row. Collective.

        Args:
            rows: Token ids of each row, of any lengths.

        Returns:
            Token ids, int64 [M, T] on the CPU, where M is the number of rows and T the length of
            the longest one. Entries after the end of a row have no meaning.
        """
        # No attention mask is needed: padding comes last, and attention is causal.
        ids_MT = pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self.pad_id
        ).to(comm.device())
        positions_MT = torch.arange(ids_MT.shape[1], device=ids_MT.device).expand_as(ids_MT)
        output = self.engine(input_ids=ids_MT, position_ids=positions_MT, use_cache=False)
        return output.logits.argmax(dim=-1).cpu()  # type: ignore[no-any-return]


@contextmanager
def without_adapters(adapters: Sequence[AdapterLinear]) -> Iterator[None]:
    """Switch adapters off while the body runs, so that the model computes as its base.

    Args:
        adapters: All adapters of the model, on every rank.
    """
    for adapter in adapters:
        adapter.base_only = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.base_only = False
