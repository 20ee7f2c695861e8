"""Training data of an edit run: every optimizer step trains on all edits, each once."""

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
from sparse_lora_dist.data.fingerprint import hash_of_documents, hash_of_tokenizer
from sparse_lora_dist.editing.answer_tokens import encode
from sparse_lora_dist.editing.edits import Edit
from sparse_lora_dist.editing.question_scores import scored_questions
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.run_folder.identity import Identity
from sparse_lora_dist.training.feed import DataFeed, settle_padding
from sparse_lora_dist.training.fits import check_ids, check_positions, check_rope


@dataclass(frozen=True, kw_only=True)
class EditFeed(DataFeed):
    """Training data of an edit run: every optimizer step trains on all edits, in order.

    A row is one edit. If the edits do not fill the micro-batches of all ranks, rows without tokens
    are added. The result of training therefore does not depend on the number of ranks.
    """

    edits: tuple[Edit, ...] = ()
    """The edits, one row each."""

    @property
    def global_batch(self) -> int:
        """Number of rows per optimizer step over all ranks, i.e. the number of edits."""
        return len(self.rows)

    @property
    def identity(self) -> str:
        """SHA-256 of the edits' prompts and answers, in hex; a resumed run must have the same."""
        texts = "\n".join(f"{e.fact.prompt}\t{e.fact.answer}" for e in self.edits)
        return sha256(texts.encode()).hexdigest()

    def batches(self, first_row: int, steps_done: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of an optimizer step.

        Every step has the same ones, so the arguments are ignored.

        Args:
            first_row: Number of the step's first row in the stream of rows.
            steps_done: Number of optimizer steps made before this step.
        """
        return self._cut(self.rows, 0, len(self.rows), shuffle=False)


def build_feed(
    edits: tuple[Edit, ...], config: Config, model: Model, tokenizer: Any, program: str
) -> EditFeed:
    """Tokenise the edits and set up the training data. Not collective.

    Also checks that the questions that are asked after training fit the model's positions.

    Args:
        edits: The edits, all of which each optimizer step trains on.
        config: Options of the run; ``max_steps`` is set.
        model: The opened model; it gives the padding token and the number of positions.
        tokenizer: The model's tokenizer.
        program: Command line that resumes this run, for messages.

    Raises:
        UserError: An edit has more tokens than --sequence_length or the model's positions allow.
    """
    rows = build_rows(edits, tokenizer, config)
    questions = [encode(tokenizer, one.question) for one in scored_questions(edits)]
    longest = max(int(rows.documents.lengths.max()), *(len(one.ids) for one in questions))
    check_positions(model, longest, "--edits")
    check_rope(model, longest, "--edits", alone=False, change="give shorter texts")
    check_ids(model, tokenizer, [one.ids for one in questions], "--edits")
    check_ids(model, tokenizer, rows.documents, "--edits")
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
        content=Identity(
            tokenizer=hash_of_tokenizer(tokenizer), data=hash_of_documents(rows.documents)
        ),
    )


def build_rows(edits: tuple[Edit, ...], tokenizer: Any, config: Config) -> Rows:
    """Encode each edit as a row "prompt target_new", with a loss on the tokens of target_new only.

    As in EasyEdit, no eos is added: an edit changes the answer, not where the text ends.

    Args:
        edits: The edits, one row each.
        tokenizer: The model's tokenizer.
        config: Options of the run, for --sequence_length and --seed.

    Raises:
        UserError: An edit has more tokens than --sequence_length.
    """
    length, rows = config.data.sequence_length, []
    for number, edit in enumerate(edits):
        encoded = encode(tokenizer, edit.fact)
        is_target = [i >= encoded.num_prompt for i in range(len(encoded.ids))]
        if len(encoded.ids) > length:
            raise UserError(
                f"Edit {number} of the selected edits, counted from 0 ({edit.subject}), has "
                f"{len(encoded.ids)} tokens, more than --sequence_length {length}. Set "
                f"--sequence_length {len(encoded.ids)} or more."
            )
        rows.append(document_row(encoded.ids, is_target, length))
    documents = Documents(
        datasets.Dataset.from_list(rows, features=FEATURES), sequence_length=length
    )
    return pack(documents, sequence_length=length, packing=False, seed=config.train.seed)
