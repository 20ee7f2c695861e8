"""Open the data of a run, find its length in optimizer steps, and make the micro-batches of any
step."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparse_lora_dist.base_model.architecture import OWN_CODE
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.paths import eval_source, resolve_default
from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import Collate, MicroBatch, Reading, Rows, be_quiet, micro_batches, pack
from sparse_lora_dist.data.batches import padded_length
from sparse_lora_dist.data.fields import find_template
from sparse_lora_dist.data.fingerprint import hash_of_documents, hash_of_files, hash_of_tokenizer
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import UserError, as_user_error
from sparse_lora_dist.model.look import rows_of_embedding
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.run_folder.identity import Identity, in_words
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.training.fits import check_ids, check_positions, check_rope

HELD_OUT_SEED = 0
"""Seed of the order in which held-out documents are packed. It is not the run's, so that runs of
any ``--seed`` score the same first rows."""
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
"""First line of a vocabulary of tiktoken: a token in base64, and its number."""
LONGEST_TOKEN = 4096
"""Bytes in which the first line of such a file ends."""


@dataclass(frozen=True, kw_only=True)
class DataFeed:
    """Data of a run: the rows to train on, and how many optimizer steps they are.

    A row is one sequence of a batch: several packed documents, or one example. A run trains on a
    stream of rows with the numbers 0, 1, 2, ...: each epoch has all rows of the data set once, in a
    new random order. A global batch is the rows of one optimizer step, over all ranks and
    micro-batches.
    """

    rows: Rows
    """Rows of the training data set, each once."""
    held_out: Rows | None
    """Rows for the held-out loss; None without ``--eval_data``."""
    pad_id: int
    """Token id used as padding."""
    collate: Collate
    """Function that makes a micro-batch of rows: ``packed_batch`` or ``labelled_batch``."""
    micro_batch_size: int
    """Rows per rank in one forward."""
    accumulation: int
    """Micro-batches per optimizer step."""
    end_row: int
    """Number of rows of the stream that the run trains on, over all epochs. If too few are left for
    the last global batch, filler rows without a loss complete it."""
    content: Identity = field(default_factory=Identity)
    """Hashes of the data: those fields of ``Identity`` that do not concern the base."""
    readings: Mapping[str, Any] = field(default_factory=dict)
    """What was read of each data set, by its option: "data" and "eval_data". Dicts of JSON values
    (see ``Reading``). ``environment.json`` holds them."""
    program: str = "launcher/train.py"
    """Program that started the run. The summary names it in the command that continues the run."""

    @property
    def identity(self) -> str:
        """Text that identifies the training rows of a run whose options do not determine them, as
        in the subclass ``EditFeed``; "" for all other runs. A resumed run must have the same text
        as its checkpoint."""
        return ""

    @property
    def global_batch(self) -> int:
        """Number of rows per optimizer step, over all ranks and micro-batches."""
        return self.micro_batch_size * self.accumulation * comm.world_size()

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run. The schedules of the learning rate and of the
        method end with the last of them."""
        return math.ceil(self.end_row / self.global_batch)

    def batches(self, first_row: int, steps_done: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of one optimizer step, ``accumulation`` of them.

        Args:
            first_row: number of the row in the stream at which the step's global batch begins.
            steps_done: number of optimizer steps made before this step. After ``--reset schedule``
                or ``--reset data``, ``first_row - steps_done * global_batch`` is not 0, and the run
                ends that many rows later in the stream than ``end_row``, or earlier if negative.
        """
        # The offset is not 0 after --reset schedule or data.
        offset = first_row - steps_done * self.global_batch
        return self._cut(self.rows, first_row, self.end_row + offset, shuffle=True)

    def held_out_part(self, limit: int) -> int | None:
        """Return how many held-out rows ``limit`` global batches score; None if that is all."""
        rows, scored = 0 if self.held_out is None else len(self.held_out), limit * self.global_batch
        return scored if scored < rows else None

    def held_out_batches(self, limit: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of the held-out rows, in the order of the data.

        Args:
            limit: largest number of global batches to take, from the first one on.
        """
        assert self.held_out is not None
        starts = range(0, len(self.held_out), self.global_batch)
        for first_row in starts[:limit]:
            yield from self._cut(self.held_out, first_row, len(self.held_out), shuffle=False)

    def _cut(self, rows: Rows, first_row: int, end_row: int, *, shuffle: bool) -> list[MicroBatch]:
        return micro_batches(
            rows,
            first_row=first_row,
            end_row=end_row,
            rank=comm.rank(),
            world_size=comm.world_size(),
            micro_batch_size=self.micro_batch_size,
            accumulation=self.accumulation,
            pad_id=self.pad_id,
            collate=self.collate,
            shuffle=shuffle,
        )


def open_feed(config: Config, model: Model) -> DataFeed:
    """Read, tokenise and pack the data sets ``--data`` and ``--eval_data``. Collective.

    The first rank of each node does it first, and the others wait. They then read the files that it
    has cached on disk.

    Args:
        config: options of the run.
        model: model whose tokenizer is used. The padding token is set in its config.

    Returns:
        The data, ready to make micro-batches; the same on every rank.

    Raises:
        UserError: the data or the tokenizer cannot be used, or ``--warmup_steps`` is longer than
            the run; on every rank.
    """
    train = config.train
    if comm.rank() > 0:
        be_quiet()
    with fail_together("reading the data"), first_on_its_node():
        tokenizer = open_tokenizer(config, model)

        def read(source: str, flag: str, split: str) -> Rows:
            with as_user_error(f"{flag} {source}", "Check the data, or convert them."):
                return _read(config, model, tokenizer, source, flag, split)

        rows = read(resolve_default("data", config.data.data), "--data", "train")
        source = eval_source(config.data)
        held_out = None if source is None else read(source, "--eval_data", "test")
        content = _content(config, tokenizer, rows, held_out) if hashes() else None
        feed = DataFeed(
            rows=rows,
            held_out=held_out,
            pad_id=settle_padding(model, tokenizer),
            collate=TASKS[config.model.task].collate,
            micro_batch_size=train.micro_batch_size,
            accumulation=train.gradient_accumulation_steps,
            end_row=_end_row(config, len(rows)),
            readings={
                name: found.documents.reading.record()
                for name, found in (("data", rows), ("eval_data", held_out))
                if found is not None and found.documents.reading is not None
            },
        )
        if train.warmup_steps > feed.total_steps:
            raise UserError(
                f"--warmup_steps {train.warmup_steps} is more than the {feed.total_steps} steps of "
                f"this run. Set it to {feed.total_steps} or less, or make the run longer with "
                "--max_steps."
            )
    return replace(feed, content=same_on_all_nodes(content))


def with_held_out_of(feed: DataFeed, manifest: Mapping[str, Any], *, packing: bool) -> DataFeed:
    """Return data whose held-out rows are packed as those of a checkpoint, so that a resumed run
    goes on to score the same ones. Checkpoints of earlier versions have them packed by the seed of
    their run.

    Args:
        feed: data of the run.
        manifest: content of the checkpoint's manifest file.
        packing: True if several documents share a row.
    """
    held_out = feed.held_out
    seed = manifest.get("held_out_seed", manifest["description"]["seed"])
    if held_out is None or seed in (None, held_out.seed):  # None: it had no held-out data
        return feed
    length = held_out.sequence_length
    again = pack(held_out.documents, sequence_length=length, packing=packing, seed=seed)
    return replace(feed, held_out=again)


def hashes() -> bool:
    """Return True if this rank hashes what it reads, for ``same_on_all_nodes``: the first of each
    node, and rank 0. Not a collective."""
    return comm.rank() == 0 or comm.is_first_on_its_node()


def _content(config: Config, tokenizer: Any, rows: Rows, held_out: Rows | None) -> Identity:
    return replace(
        identity_of_tokenizer(config, tokenizer),
        data=hash_of_documents(rows.documents),
        data_files=hash_of_files(resolve_default("data", config.data.data)),
        eval_data=None if held_out is None else hash_of_documents(held_out.documents),
    )


def identity_of_tokenizer(config: Config, tokenizer: Any) -> Identity:
    """Return the hashes of a tokenizer and of the template that renders chats. Not a collective.

    Args:
        config: options, of which ``chat_template`` and ``task`` are used.
        tokenizer: tokenizer of the model.
    """
    template: object = tokenizer.chat_template  # text, or a dict of named templates
    if config.data.chat_template is not None:
        template = find_template(tokenizer, config.data.chat_template)
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    has_template = config.model.task == "causal_lm" and template is not None
    return Identity(
        tokenizer=hash_of_tokenizer(tokenizer),
        chat_template=sha256(text.encode()).hexdigest() if has_template else None,
    )


def same_on_all_nodes(content: Identity | None) -> Identity:
    """Return rank 0's hashes of the data, after comparing them with those of every node.
    Collective.

    Args:
        content: hashes of what this rank read; None on ranks that did not compute them.

    Raises:
        UserError: a node read other data than rank 0, or has another tokenizer.
    """
    everyone: list[Identity | None] = comm.gather_objects(content)
    first = everyone[0]
    assert first is not None
    for rank, other in enumerate(everyone):
        if other is not None and (differ := first.differences(other)):
            raise UserError(
                f"Not all nodes have the same data: rank {rank} and rank 0 differ in "
                f"{in_words(differ)}. Copy the same files to every machine, or use a shared disk.",
                shared=True,
            )
    return first


def open_tokenizer(config: Config, model: Model) -> Any:
    """Return the transformers tokenizer in the model's folder. Not a collective.

    Args:
        config: options of the run, of which only ``trust_remote_code`` is used.
        model: model whose ``folder`` holds the tokenizer.

    Raises:
        UserError: the tokenizer is missing or damaged.
    """
    trust = config.model.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=trust)
    except Exception as error:  # a missing or damaged file raises whatever its reader does
        if not trust and "trust_remote_code" in str(error):
            message = f"The tokenizer of --model {model.folder} {OWN_CODE}"
            raise UserError(message) from error
        raise UserError(
            f"The tokenizer of --model {model.folder} cannot be opened: {error}. "
            f"{_advice(model.folder)}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"The tokenizer of --model {model.folder} is a {type(tokenizer).__name__}, which is "
            "written in Python. Only tokenizers of the package tokenizers, of which transformers "
            "saves a tokenizer.json, can be used. Choose another --model."
        )
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise UserError(
            f"The tokenizer of --model {model.folder} draws tokens at random (dropout in its "
            "tokenizer.json), so rows would differ between jobs and nodes. Set model.dropout to "
            "null in a copy of that file."
        )
    # transformers takes away at its first call what a tokenizer.json says of these. Texts are never
    # cut or padded here, and the tokenizer is compared with that of other jobs.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _advice(folder: Path) -> str:
    for file in sorted(folder.glob("*.model")):
        with file.open("rb") as opened:
            if TIKTOKEN.match(opened.read(LONGEST_TOKEN)):
                return f"Its {file.name} is of tiktoken. Give a folder with a tokenizer.json too."
        if find_spec("sentencepiece") is None:  # transformers names tiktoken
            return f"Its {file.name} is of SentencePiece. Run: pip install sentencepiece"
    return "Give a model folder that has a tokenizer."


def settle_padding(model: Model, tokenizer: Any) -> int:
    """Return the token id used as padding, and set it as ``pad_token_id`` of the model's config.

    It is the first that exists, and has a row in the model's embedding, of: the model's pad token,
    the tokenizer's pad token, the tokenizer's eos token, 0.

    Args:
        model: model whose config is changed.
        tokenizer: tokenizer of the model.
    """
    architecture = model.module.config.get_text_config()
    own = getattr(architecture, "pad_token_id", None)  # some old configs have no such field
    padding = (own, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    rows = rows_of_embedding(model.module)
    # Decoders for classification look for it: they answer at the last token before the padding.
    architecture.pad_token_id = next(i for i in padding if i is not None and 0 <= i < rows)
    return int(architecture.pad_token_id)


def _end_row(config: Config, rows_per_epoch: int) -> int:
    train = config.train
    if train.max_steps is None:
        return rows_of(train.num_epochs, rows_per_epoch)
    return (
        train.max_steps
        * train.micro_batch_size
        * train.gradient_accumulation_steps
        * comm.world_size()
    )


def rows_of(num_epochs: float, rows_per_epoch: int) -> int:
    """Return the number of rows of so many passes over the data, rounded up.

    Args:
        num_epochs: as it is written: 1.1 is 11/10, and not its neighbour in binary.
        rows_per_epoch: rows of the data set.
    """
    return math.ceil(Fraction(str(num_epochs)) * rows_per_epoch)


def _read(config: Config, model: Model, tokenizer: Any, source: str, flag: str, split: str) -> Rows:
    data = config.data
    task = TASKS[config.model.task]
    documents = task.read(
        source,
        tokenizer,
        model.module.config,
        data,
        column_names=data.column_names,
        sequence_length=data.sequence_length,
        max_samples=data.max_samples if flag == "--data" else None,
        flag=flag,
        split=split,
    )
    if documents.reading is not None:
        documents.reading = documents.reading.with_unused(given(data, task.other_options))
    rows = pack(
        documents,
        sequence_length=data.sequence_length,
        packing=config.packs,
        seed=config.train.seed if flag == "--data" else HELD_OUT_SEED,
    )
    longest = int(documents.lengths.max())
    padded = padded_length([longest], data.sequence_length)
    check_positions(model, longest, flag, padded=padded)
    alone = not config.packs and config.train.micro_batch_size == 1
    change = "--packing false --micro_batch_size 1"
    check_rope(model, longest, flag, alone=alone, change=change)
    check_ids(model, tokenizer, documents, flag)
    print_line(
        flag.lstrip("-"),
        f"{documents.report()}; {len(rows)} rows of up to {data.sequence_length} tokens",
    )
    print_reading(documents.reading, notes_of=flag if flag == "--data" else None)
    return rows


def given(data: DataConfig, names: tuple[str, ...]) -> dict[str, bool]:
    """Return for each of some options whether the user gave it: True if its value is not the
    default.

    Args:
        data: data options of the run.
        names: names of some of them.
    """
    default = DataConfig()
    return {f"--{name}": getattr(data, name) != getattr(default, name) for name in names}


def print_reading(reading: Reading | None, *, notes_of: str | None) -> None:
    """Print what of a data set was read and what was not, below the line of its numbers.

    Args:
        reading: what was read; None prints nothing.
        notes_of: option with which the notes about the data begin; None: they are not printed.
    """
    if reading is not None:
        print_line("", reading.report())
        for note in reading.notes if notes_of else ():
            print_line("note", f"{notes_of}: {note}")
