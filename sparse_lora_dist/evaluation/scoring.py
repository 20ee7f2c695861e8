"""Likelihood and answers of one model, example by example.

Shapes: M rows of a batch, T tokens of its longest row (padded).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from sparse_lora_dist.data import NOT_A_TARGET, Document, Documents
from sparse_lora_dist.data.batches import padded
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.runtime.batches_over_ranks import in_batches
from sparse_lora_dist.tasks.loss_head import target_losses
from sparse_lora_dist.zero3.engine import Engine

Score = tuple[float, int]
"""(sum of -log p over an example's targets, in float64; how many they are)."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model that evaluates. Every method is a collective."""

    engine: Engine
    tokenizer: Any
    pad_id: int
    stop_ids: frozenset[int]
    """What ends an answer."""
    batch_size: int
    max_new_tokens: int

    def scores(self, documents: Sequence[Document] | Documents, name: str) -> list[Score]:
        """Likelihood of each document's targets.

        Raises:
            UserError: one is no number.
        """
        found = in_batches(
            range(len(documents)),
            self.batch_size,
            lambda numbers: self._scores([documents[n] for n in numbers]),
            name=name,
        )
        if bad := [i for i, (total, _) in enumerate(found) if not math.isfinite(total)]:
            raise UserError(
                f"{name}: the loss of {len(bad)} of {len(found)} texts is no finite number, the "
                f"first is number {bad[0] + 1}. Try --precision fp32; if it stays, the weights of "
                "the model or its adapter are broken.",
                shared=True,
            )
        return found

    def _scores(self, documents: Sequence[Document]) -> list[Score]:
        length = max(len(d.input_ids) for d in documents)
        ids_MT = padded([d.input_ids for d in documents], length, self.pad_id)
        labels_MT = padded([d.labels for d in documents], length, NOT_A_TARGET)
        next_MT = F.pad(labels_MT[:, 1:], (0, 1), value=NOT_A_TARGET)
        with self.engine.evaluating():
            losses_N = target_losses(
                self.engine,
                next_MT,
                input_ids=ids_MT.to(comm.device()),
                # A row is one document. Attention is causal: what is padded sees it, and not
                # the other way round.
                position_ids=torch.arange(length, device=comm.device()).expand_as(ids_MT),
                use_cache=False,
            )
        counts = (next_MT != NOT_A_TARGET).sum(dim=1).tolist()
        parts = losses_N.double().cpu().split(counts)
        return [(float(part.sum()), n) for part, n in zip(parts, counts, strict=True)]

    def answers(self, prompts: Sequence[list[int]], name: str) -> list[str]:
        """What the model says after each prompt: the likeliest token each time, until it ends its
        turn."""
        return in_batches(prompts, self.batch_size, self._answers, name=name)

    def _answers(self, prompts: Sequence[list[int]]) -> list[str]:
        length = max(map(len, prompts))
        # Padded on the left, so that all rows go on from the same place.
        left = [np.array([self.pad_id] * (length - len(p)) + p) for p in prompts]
        seen = [np.array([0] * (length - len(p)) + [1] * len(p)) for p in prompts]
        with self.engine.evaluating():
            model: Any = self.engine.model
            ids_MT = model.generate(
                input_ids=padded(left, length, 0).to(comm.device()),
                attention_mask=padded(seen, length, 0).to(comm.device()),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=sorted(self.stop_ids) or None,
                    pad_token_id=self.pad_id,
                ),
                # A rank that is done runs on, its tokens dropped, until all are.
                synced_gpus=True,
            )
        return [self._text(row[length:]) for row in ids_MT.tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
