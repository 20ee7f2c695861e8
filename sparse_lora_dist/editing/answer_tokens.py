"""What the model says: its first choices at an answer's tokens, and texts that go on from a prompt.

Everything here is a collective.

Shapes: M rows of a batch, T tokens of its longest row.
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
class Encoded:
    """A question in tokens."""

    ids: list[int]
    num_prompt: int
    """Tokens before the first that is the answer's."""

    @property
    def answer(self) -> list[int]:
        return self.ids[self.num_prompt :]


def encode(tokenizer: Any, question: Question) -> Encoded:
    """ "prompt answer", with a space between the two, and bos where the tokenizer puts it.

    EasyEdit counts the prompt's own tokens; where the answer changes the last of them, ours begins
    with the first that differs.
    """
    prompt = without_end(tokenizer, question.prompt)
    ids = without_end(tokenizer, f"{question.prompt} {question.answer}")
    pairs = zip(prompt, ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt))
    return Encoded(ids=ids, num_prompt=max(1, min(same, len(ids) - 1)))


def without_end(tokenizer: Any, text: str) -> list[int]:
    """The text's ids, without the eos that some tokenizers put after every text."""
    ids: list[int] = tokenizer(text).input_ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """An engine that answers."""

    engine: Engine
    tokenizer: Any
    pad_id: int
    batch_size: int

    def first_choices(self, questions: Sequence[Encoded]) -> list[list[int]]:
        """For each token of each answer the likeliest, given all before it."""

        def of_batch(batch: Sequence[Encoded]) -> list[list[int]]:
            chosen_MT = self._choices([q.ids for q in batch])
            places = [slice(q.num_prompt - 1, len(q.ids) - 1) for q in batch]
            return [row[place].tolist() for row, place in zip(chosen_MT, places, strict=True)]

        with self.engine.evaluating():
            return in_batches(questions, self.batch_size, of_batch, name="questions")

    def texts(self, prompts: Sequence[str], num_tokens: int) -> list[str]:
        """Each prompt with so many of the likeliest tokens after it, an end of text not heeded.

        Without a cache of keys and values: under ZeRO-3 a forward costs what it gathers, however
        few its tokens are.
        """

        def of_batch(batch: Sequence[list[int]]) -> list[str]:
            rows = [list(ids) for ids in batch]
            for _ in range(num_tokens):
                chosen_MT = self._choices(rows)
                for row, chosen_T in zip(rows, chosen_MT, strict=True):
                    row.append(int(chosen_T[len(row) - 1]))
            return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

        with self.engine.evaluating():
            encoded = [without_end(self.tokenizer, prompt) for prompt in prompts]
            return in_batches(encoded, self.batch_size, of_batch, name="texts")

    def _choices(self, rows: Sequence[list[int]]) -> Tensor:
        # Padding comes last, where no token looks.
        ids_MT = pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self.pad_id
        ).to(comm.device())
        positions_MT = torch.arange(ids_MT.shape[1], device=ids_MT.device).expand_as(ids_MT)
        output = self.engine(input_ids=ids_MT, position_ids=positions_MT, use_cache=False)
        return output.logits.argmax(dim=-1).cpu()  # type: ignore[no-any-return]


@contextmanager
def without_adapters(adapters: Sequence[AdapterLinear]) -> Iterator[None]:
    """The base alone answers inside: every delta is zero."""
    for adapter in adapters:
        adapter.base_only = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.base_only = False
