"""Edits as rows to train on: every step takes all of them, each once."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import datasets

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.data import (
    FEATURES,
    Documents,
    MicroBatch,
    Rows,
    document_row,
    pack,
    packed_batch,
)
from sparse_lora_dist.editing.answer_tokens import encode
from sparse_lora_dist.editing.edits import Edit
from sparse_lora_dist.editing.probe_scores import asked_of
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.training.feed import DataFeed, check_positions, settle_padding


@dataclass(frozen=True, kw_only=True)
class EditFeed(DataFeed):
    """A step's rows are the edits in their order, on any number of ranks; empty rows fill up."""

    edits: tuple[Edit, ...] = ()

    @property
    def global_batch(self) -> int:
        return len(self.rows)

    @property
    def identity(self) -> str:
        texts = "\n".join(f"{e.fact.prompt}\t{e.fact.answer}" for e in self.edits)
        return sha256(texts.encode()).hexdigest()

    def batches(self, first_row: int, steps_done: int) -> list[MicroBatch]:
        """This rank's part of all edits, whatever the step."""
        return self._cut(self.rows, 0, len(self.rows), shuffle=False)


def feed_of(
    edits: tuple[Edit, ...], config: Config, model: Model, tokenizer: Any, program: str
) -> EditFeed:
    """No collectives.

    Raises:
        UserError: an edit is too long.
    """
    rows = rows_of(edits, tokenizer, config)
    asked = [encode(tokenizer, ask.question) for ask in asked_of(edits)]
    longest = max(int(rows.documents.lengths.max()), *(len(question.ids) for question in asked))
    check_positions(model.module, longest, "--edits")
    assert config.train.max_steps is not None
    return EditFeed(
        rows=rows,
        held_out=None,
        pad_id=settle_padding(model, tokenizer),
        collate=packed_batch,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        end_row=config.train.max_steps * len(rows),
        program=program,
        edits=edits,
    )


def rows_of(edits: tuple[Edit, ...], tokenizer: Any, config: Config) -> Rows:
    """ "prompt target" each, of which the target's tokens are learned, without an end of text, as
    in EasyEdit: the edit is of what comes next, not of where it ends."""
    length, rows = config.data.sequence_length, []
    for number, edit in enumerate(edits):
        encoded = encode(tokenizer, edit.fact)
        is_target = [i >= encoded.num_prompt for i in range(len(encoded.ids))]
        if len(encoded.ids) > length:
            raise UserError(
                f"--edits: edit {number} of these, of {edit.subject}, has {len(encoded.ids)} "
                f"tokens. Set --sequence_length {len(encoded.ids)} or more."
            )
        rows.append(document_row(encoded.ids, is_target, length))
    documents = Documents(
        datasets.Dataset.from_list(rows, features=FEATURES), sequence_length=length
    )
    return pack(documents, sequence_length=length, packing=False, seed=config.train.seed)
