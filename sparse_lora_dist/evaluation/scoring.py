"""Computes losses of given texts, and generates texts, with one sharded model.

Shapes: M number of rows of a batch, T number of tokens of its longest row, to which the others are
padded, N number of targets of a batch (tokens with a loss).
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
from sparse_lora_dist.evaluation.answer_frame import AnswerFrame
from sparse_lora_dist.runtime.batches_over_ranks import in_batches
from sparse_lora_dist.tasks.loss_head import target_losses
from sparse_lora_dist.zero3.engine import Engine

Loss = tuple[float, int]
"""(loss, number of targets) of one text.

The targets are the tokens that are scored. The loss is -log p of the targets in nats, summed in
float64.
"""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A loaded model that scores and generates text. Every method is collective.

    All ranks pass the same texts. These are cut into batches in their order, each batch is
    computed by one rank, and every rank gets all results. The results do not depend on the number
    of ranks.
    """

    engine: Engine
    """Engine of the loaded model."""
    tokenizer: Any
    """Decodes generated tokens."""
    pad_id: int
    """Token id that rows are padded with."""
    stop_ids: frozenset[int]
    """Token ids that end a generated text."""
    batch_size: int
    """Number of texts in one batch, which one rank computes."""
    max_new_tokens: int
    """Maximum number of generated tokens per prompt."""
    frame: AnswerFrame = AnswerFrame()
    """What the chat template puts around an answer."""

    def losses(self, documents: Sequence[Document] | Documents, name: str) -> list[Loss]:
        """Compute the loss of each document's targets. Collective.

        Args:
            documents: Tokenised texts, with labels that mark the targets. Each is a row of its
                batch by itself, never packed with others.
            name: Name of the metric, for the progress bar and messages.

        Returns:
            (loss in nats, summed over the targets; number of targets) of each document, in order,
            on every rank.

        Raises:
            UserError: A loss is not finite. Raised on every rank.
        """
        found = in_batches(
            range(len(documents)),
            self.batch_size,
            lambda numbers: self._losses([documents[n] for n in numbers]),
            name=name,
        )
        if bad := [i for i, (total, _) in enumerate(found) if not math.isfinite(total)]:
            is_fp32 = next(self.engine.model.parameters()).dtype == torch.float32
            first = "The" if is_fp32 else "Try --precision fp32. If that does not help, the"
            raise UserError(
                f"Metric {name}: the loss of {len(bad)} of {len(found)} texts is not finite, first "
                f"for text {bad[0] + 1}. {first} weights of the model or of the adapter are "
                "damaged: get a new copy of them.",
                shared=True,
            )
        return found

    def _losses(self, documents: Sequence[Document]) -> list[Loss]:
        length = max(len(d.input_ids) for d in documents)
        ids_MT = padded([d.input_ids for d in documents], length, self.pad_id)
        labels_MT = padded([d.labels for d in documents], length, NOT_A_TARGET)
        next_MT = F.pad(labels_MT[:, 1:], (0, 1), value=NOT_A_TARGET)
        with self.engine.evaluating():
            losses_N = target_losses(
                self.engine,
                next_MT,
                input_ids=ids_MT.to(comm.device()),
                # No attention mask is needed: padding comes last, and attention is causal, so
                # no token of the document attends to it.
                position_ids=torch.arange(length, device=comm.device()).expand_as(ids_MT),
                use_cache=False,
            )
        counts = (next_MT != NOT_A_TARGET).sum(dim=1).tolist()
        parts = losses_N.double().cpu().split(counts)
        return [(float(part.sum()), n) for part, n in zip(parts, counts, strict=True)]

    def generate(self, prompts: Sequence[list[int]], name: str) -> list[str]:
        """Generate greedily after each prompt until a stop id or ``max_new_tokens``. Collective.

        Args:
            prompts: Token ids of each prompt.
            name: Name of the metric, for the progress bar.

        Returns:
            The generated text of each prompt, without special tokens, in order, on every rank.
        """
        return in_batches(prompts, self.batch_size, self._generate, name=name)

    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        length = max(map(len, prompts))
        # Padding is on the left, so that all rows generate from the same position.
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
                # A finished rank goes on with forwards whose results nobody reads, until all are
                # finished: every forward gathers shards from all ranks.
                synced_gpus=True,
            )
        return [self._text(row[length:]) for row in ids_MT.tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
