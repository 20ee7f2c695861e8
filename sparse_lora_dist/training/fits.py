"""Check that the data fit the model before the base is loaded (token ids, positions), and that the
first loss is a number."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PretrainedConfig

from sparse_lora_dist.data import Documents
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import rows_of_embedding, runs_at
from sparse_lora_dist.model.model import Model

SHOWN = 60
"""Letters of a document that a message shows."""


def check_ids(
    model: Model, tokenizer: Any, examples: Documents | Iterable[Sequence[int]], flag: str
) -> None:
    """Raise UserError if a token of the data has no row in the model's embedding.

    torch's own error would be an index out of range, or a device-side assert on a GPU.

    Args:
        model: opened model.
        tokenizer: its tokenizer. The data are read only if it knows a token beyond the embedding.
        examples: documents, or lists of token ids.
        flag: command-line flag of the data, for the message.

    Raises:
        UserError: a token has no row; the message has the first example that has it.
    """
    rows = rows_of_embedding(model.module)
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    if isinstance(examples, Documents):
        found = examples.first_with_id_from(rows)
        ids = [] if found is None else examples[found[0]].input_ids.tolist()
    else:
        wrong = ((i, list(ids)) for i, ids in enumerate(examples) if max(ids, default=0) >= rows)
        index, ids = next(wrong, (0, []))
        found = (index, max(ids)) if ids else None
    if found is not None:
        index, largest = found
        text = tokenizer.decode(ids)[:SHOWN]
        raise UserError(
            f"In {flag}, example {index + 1} ({text!r}) has the token "
            f"{tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest}, but the model's "
            f"embedding has only {rows} rows: the tokenizer knows tokens that the model does not. "
            "Give the model with its own tokenizer and chat template, or enlarge it first with "
            "resize_token_embeddings of transformers."
        )


def check_positions(
    model: Model, longest: int, flag: str, *, padded: int | None = None, new_tokens: int = 0
) -> None:
    """Raise UserError if a row is longer than the model has positions. Print a note if it is longer
    than the rows that a model with rotary positions was trained on.

    Args:
        model: opened model.
        longest: number of tokens of the longest document.
        flag: command-line flag of the data, for the message.
        padded: number of tokens of the longest row with its padding; None for ``longest``.
        new_tokens: how many of ``longest`` the model generates (``--max_new_tokens``).

    Raises:
        UserError: a table of positions has fewer rows.
    """
    architecture = model.module.config.get_text_config()
    padded = longest if padded is None else padded
    for table in model.look.tables:
        if (longest if table.restarts else padded) > table.room:
            name = table.name.removesuffix(".weight")
            if longest <= table.room:
                name += f", of which the row takes {padded} with its padding"
            raise UserError(_too_long(longest, table.room, name, flag, new_tokens))
    if longest > (room := getattr(architecture, "max_seq_len", None) or longest):  # MPT
        raise UserError(_too_long(longest, room, "max_seq_len", flag, new_tokens))
    room = getattr(architecture, "max_position_embeddings", None) or longest
    if not (isinstance(room, int) and longest > room):
        return
    if model.look.apart is not None and not runs_at(model.module, longest - 1):
        raise UserError(_too_long(longest, room, "max_position_embeddings", flag, new_tokens))
    if is_rotary(architecture):
        print_line(
            "note",
            f"in {flag} the longest document has {longest} tokens, but the model was trained on at "
            f"most {room} positions (max_position_embeddings), and its rotary positions are not "
            "scaled for more",
        )


def check_rope(model: Model, longest: int, flag: str, *, alone: bool, change: str) -> None:
    """Raise UserError if a document's rotary positions would depend on the documents beside it.

    transformers chooses the frequencies of the kinds longrope and dynamic by the longest document
    of a batch; those of dynamic also stay what an earlier batch made them.

    Args:
        model: opened model.
        longest: number of tokens of the longest document.
        flag: command-line flag of the data, for the message.
        alone: True if each batch is one document.
        change: options that make it so, for the message.
    """
    architecture = model.module.config.get_text_config()
    for part in _rope_parts(architecture):
        kind = part.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            continue
        room = architecture.max_position_embeddings
        if kind == "longrope":
            own = getattr(architecture, "original_max_position_embeddings", None)
            room = part.get("original_max_position_embeddings") or own or room
        if longest <= room or (alone and kind == "longrope"):
            continue
        said = (
            f"In {flag} the longest document has {longest} tokens. With rotary positions of the "
            f"kind {kind} (rope_type in config.json) transformers computes a batch with a document "
            f"of more than {room} tokens in another way, the documents beside it or after it too. "
            f"Set --sequence_length {room} or less{f', or {change}' if kind == 'longrope' else ''}."
        )
        if not model.as_before:
            raise UserError(said)
        print_line("note", f"this run goes on as it began. {said}")


def _too_long(longest: int, room: int, where: str, flag: str, new_tokens: int) -> str:
    advice, prompt = f"Set --sequence_length to {room} or less", longest - new_tokens
    if new_tokens > 0:
        advice = f"The longest prompt has {prompt} tokens: "
        advice += (
            f"set --max_new_tokens to {room - prompt} or less"
            if prompt < room
            else "leave out questions that are so long"
        )
    return (
        f"In {flag} the longest row has {longest} tokens, but the model has only {room} positions "
        f"({where}). {advice}."
    )


def is_rotary(architecture: PretrainedConfig) -> bool:
    """Return True if a model has rotary positions (RoPE) that are not scaled.

    Args:
        architecture: config of the language model.
    """
    kinds = {part.get("rope_type", "default") for part in _rope_parts(architecture)}
    return kinds == {"default"}


def _rope_parts(architecture: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the parameters of each kind of rotary positions of a model; [] if it has none."""
    rope = getattr(architecture, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)]
    return parts or ([rope] if rope else [])


def check_first_loss(loss: float) -> None:
    """Raise UserError if the held-out loss before the first step is not finite. Not a collective.

    Args:
        loss: the loss in nats per target, the same on every rank.
    """
    if not math.isfinite(loss):
        raise UserError(
            "The held-out loss is not finite before the first step: the weights of --model or "
            "--init_adapter are damaged, or too large for --precision. Get a new copy of them, or "
            "try --precision fp32.",
            shared=True,
        )
