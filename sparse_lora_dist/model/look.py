"""Ask a model, before any of its weights is read, what a run must know of its architecture.

Two rows of two short documents each go through a copy of the model without its weights
(``stand_in``), called as a training step calls it. The rows differ in their first document only. So
one forward on the CPU, of milliseconds to seconds, shows for any architecture whether packed
documents see each other, which linears a text runs, which weights are read by something else than
their linear, and which tables have a row for each position. There is no list of architectures.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.stand_in import stand_in

SEEN = "packed documents of a {} model see each other, since its layers go on where one ends"
"""Why documents are not packed. The field is the model_type of the model."""
SCALED = "a {} model scales attention by a token's place in its row, from {} tokens on"
"""The same, of Llama 4's layers without positions (``attn_temperature_tuning``)."""
TOKENS = 8
"""Tokens of each of the two documents of a row."""
TOO_LARGE = 1e-4
"""Documents see each other if changing one moves the logits of the other by more than this part of
what it moves its own. In fp32, rounding moves them by 1e-6 at most."""
MUCH = 0.1
"""A classifier whose logits padding moves by more than this part of what other text moves them is
refused."""
OPERATIONS = (
    torch.ops.aten.embedding.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.index.Tensor,
)
"""Operations that look rows of a table up."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A trained table with one row for each position."""

    name: str
    """Name of its parameter."""
    room: int
    """Number of tokens that a row of a batch may have."""
    restarts: bool
    """True if the positions are those of the batch, which begin at 0 in each document."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one forward over text has shown of an architecture. The defaults claim nothing."""

    apart: bool | None = None
    """True if packed documents do not see each other. None if it is not known: the task packs none,
    or the copy could not be run."""
    unrun: frozenset[str] = frozenset()
    """Names of linears that a forward over text does not run, such as those of a vision tower."""
    read: frozenset[str] = frozenset()
    """Names of linears whose weight or bias the model uses without calling the linear. It must be
    there as it is, neither in 4 bits nor with an adapter."""
    tables: tuple[Table, ...] = ()
    """Trained tables of positions."""
    changed: str | None = None
    """Name of a parameter that the model changes while it runs; None if there is none."""
    untrained: frozenset[str] = frozenset()
    """Names of modules that a text does not run, and which get no gradient from it."""
    switched: str = ""
    """What the model sets in itself when it reads a short text, and does not set back; "" if
    nothing. BigBird changes its kind of attention so."""
    scaled_from: int = 0
    """Tokens of a row from which on attention depends on a token's place in the row, not in its
    document; 0 if it never does."""
    sees_ahead: bool = False
    """True if a token of a causal language model sees those after it."""
    padding_moves: float = 0.0
    """How far padding moves a classifier's logits, although the attention mask marks it, as a part
    of what other text moves them. 0.002 where convolutions reach into it, as in ConvBERT; 0.8 where
    the answer is read from it, as in XLNet, which answers at the last token of the padded row."""

    @property
    def matters(self) -> bool:
        """True if a run over this architecture is set up in another way than over a usual one."""
        return self.apart is False or bool(self.unrun or self.read)


def look_at(model: PreTrainedModel, task: str) -> Look:
    """Return what can be known of an architecture. Not a collective.

    What cannot be known, because the architecture's code does not run without its weights, is left
    at the defaults of ``Look``.

    Args:
        model: model on the meta device; it is not changed.
        task: "causal_lm" or "seq_cls".
    """
    seen = _Seen()
    try:
        few = stand_in(model)
        names = seen.watch(few)
        lookups, before = _Lookups(few), _words_in(few)
        with torch.no_grad(), lookups:
            logits = few(**inputs_of(few, task)).logits
        switched = _switched(before, _words_in(few))
        ahead = task == "causal_lm" and _sees_ahead(few)
        moves = _padding_moves(few) if task == "seq_cls" else 0.0
        run = _run_by_text(few, names, seen.ran)
        # Kernels take weights in training only.
        with torch.no_grad(), suppress(Exception), lookups:
            few.train()(**inputs_of(few, task))
    except Exception:  # code of any architecture
        return Look()
    return Look(
        apart=documents_apart(logits, TOO_LARGE) if task == "causal_lm" else None,
        unrun=frozenset({*names} - run - seen.asked),
        read=frozenset(seen.asked),
        tables=tuple(lookups.tables.values()),
        changed=lookups.changed,
        untrained=_untrained(few, task) - seen.ran - seen.asked,
        switched=switched,
        scaled_from=_scaled_from(few),
        sees_ahead=ahead,
        padding_moves=moves,
    )


def look_together(model: PreTrainedModel, task: str) -> Look:
    """Return what rank 0 knows by ``look_at``, the same on every rank. Collective."""
    found: Look = comm.broadcast_object(look_at(model, task) if comm.rank() == 0 else None)
    return found


def settle_packing(config: Config, look: Look, kind: str) -> tuple[Config, list[str]]:
    """Return the options of a run, with packing off if packed documents would see each other.

    Args:
        config: options of the run.
        look: what is known of the model.
        kind: model_type of the model, for messages.

    Returns:
        The options, and what to tell the user.

    Raises:
        UserError: ``--packing true`` was given.
    """
    scaled = 0 < look.scaled_from <= config.data.sequence_length
    if not config.packs or (look.apart is not False and not scaled):
        return config, []
    why = SCALED.format(kind, f"{look.scaled_from:,}") if scaled else SEEN.format(kind)
    if config.data.packing:
        shorter = f", or --sequence_length below {look.scaled_from}" if look.apart else ""
        raise UserError(
            f"--packing true cannot be used: {why}. Set --packing false, which gives each document "
            f"a row of its own{shorter}.",
            shared=True,
        )
    alone = replace(config, data=replace(config.data, packing=False))
    return alone, [f"--packing is false: {why}"]


def refuse_changing_weights(module: PreTrainedModel, look: Look) -> None:
    """Raise ``UserError`` if the model changes its own weights or settings while it runs, as RWKV
    and BigBird do."""
    if look.changed is not None:
        raise UserError(
            f"A {module.config.model_type} model changes {look.changed} while it runs. Here a "
            "weight is put together from the ranks' shards for each use, so the change would be "
            "lost. Choose another --model."
        )
    if look.switched:
        raise UserError(
            f"A {module.config.model_type} model sets {look.switched} when it reads a short batch, "
            "and does not set it back. So what a row gives would depend on the rows before it. Set "
            "it in the config.json of --model for all rows, or choose another model."
        )


def not_run(full: Collection[str], look: Look) -> list[str]:
    """Return a note for each module that trains in full, but that a text does not run.

    Args:
        full: names of the modules that train in full.
        look: what is known of the model.
    """
    return [
        f"a text does not run {name} of --modules_to_save: it learns nothing, and --weight_decay "
        "makes it smaller. Leave it out"
        for name in full
        if name in look.untrained
    ]


def refuse_no_embedding(module: PreTrainedModel) -> None:
    """Raise ``UserError`` if what the model calls its input embeddings is no table of tokens.

    Perceiver's are latent vectors.
    """
    if not isinstance(module.get_input_embeddings(), nn.Module):
        raise UserError(
            f"A {module.config.model_type} model cannot be trained here: it does not say which "
            "module embeds its tokens. Choose another --model."
        )


def refuse_seeing_ahead(module: PreTrainedModel, look: Look) -> None:
    """Raise ``UserError`` if the model sees the tokens that it should predict, as Gemma 3 does with
    ``use_bidirectional_attention``, and XLNet."""
    if look.sees_ahead:
        raise UserError(
            f"In this {module.config.model_type} model a token sees those after it (bidirectional "
            "attention), so it cannot be trained as a causal language model, nor its loss be "
            "measured. Train it as a classifier with launcher/train.py --task seq_cls, or choose a "
            "decoder model."
        )


def refuse_positions_after_padding(module: PreTrainedModel, *, as_before: bool = False) -> None:
    """Raise ``UserError`` for RoBERTa and its relatives, which count positions from the number of
    the padding token on, unless the run began before. Rows of language modelling have positions
    from 0 on."""
    counts = "create_position_ids_from_input_ids"
    if not as_before and any(hasattr(inner, counts) for inner in module.modules()):
        raise UserError(
            f"A {module.config.model_type} model counts positions from its padding token's number "
            "on, which --task causal_lm does not, so it would see other positions than it learned. "
            "Train it as a classifier with launcher/train.py --task seq_cls, or choose a decoder "
            "model."
        )


def _sees_ahead(few: PreTrainedModel) -> bool:
    """Return True if the last token of a row moves the logits of tokens before it."""
    inputs = inputs_of(few, "causal_lm")
    first, other = inputs["input_ids"][0], inputs["input_ids"][1]
    changed = torch.cat([first[:-1], other[other != first[-1]][:1]])
    with torch.no_grad(), suppress(Exception):
        logits = few(**inputs | {"input_ids": torch.stack([first, changed])}).logits
        moved_T = (logits[0] - logits[1]).abs().amax(dim=-1)
        return bool(moved_T[:-1].max() > TOO_LARGE * moved_T[-1])
    return False


def _scaled_from(few: PreTrainedModel) -> int:
    scales = [
        int(getattr(module, "floor_scale", 0))
        for module in few.modules()
        if getattr(module, "attn_temperature_tuning", False)
        and not getattr(module, "use_rope", True)
    ]
    return min(scales, default=0)


def settle_padded_rows(module: PreTrainedModel, look: Look) -> str:
    """Return a note that a classifier's logits depend on padding a little; "" if they do not.

    Raises:
        UserError: they depend on it so much that nothing is learned of the text.
    """
    if look.padding_moves <= TOO_LARGE:
        return ""
    said = (
        f"The logits of a {module.config.model_type} classifier change when its rows are padded, "
        "as rows of unlike lengths are, so losses and scores depend on which rows stand in a "
        "micro-batch"
    )
    if look.padding_moves > MUCH:
        raise UserError(f"{said}, by as much as on the text. Choose another --model.")
    return f"{said}, by about {look.padding_moves:.1g} of what the text changes"


def _padding_moves(few: PreTrainedModel) -> float:
    """Return ``Look.padding_moves``, from two rows without and with padding."""
    inputs = inputs_of(few, "seq_cls")
    pad = few.config.get_text_config().pad_token_id
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = {"input_ids": F.pad(ids, (0, 8), value=pad), "attention_mask": F.pad(mask, (0, 8))}
    with torch.no_grad(), suppress(Exception):
        alone, longer = few(**inputs).logits, few(**padded).logits
        return float((longer - alone).abs().max() / (alone[0] - alone[1]).abs().max())
    return 0.0


def runs_at(model: PreTrainedModel, position: int) -> bool:
    """Return False if the model has no row for a position in one of its tables, trained or not.

    Args:
        model: causal language model on the meta device; it is not changed.
        position: position of a token, from 0.
    """
    try:
        few = stand_in(model)
        with torch.no_grad():
            few(**inputs_of(few, "causal_lm") | {"position_ids": torch.full((2, 16), position)})
    except Exception as error:  # code of any architecture
        return not isinstance(error, IndexError) and "out of bounds" not in str(error)
    return True


def inputs_of(model: PreTrainedModel, task: str, tokens: int = TOKENS) -> dict[str, Any]:
    """Return the inputs of the two rows, as a training step passes them to the model.

    Args:
        model: the model, whose special tokens are avoided.
        task: "causal_lm" or "seq_cls".
        tokens: number of tokens of each document.
    """
    usual = _usual_tokens(model)
    places = torch.randint(len(usual), (2 * tokens,), generator=torch.Generator().manual_seed(1))
    others = places.clone()
    others[:tokens] += max(1, len(usual) // 2)
    ids_MT = torch.tensor(usual)[torch.stack([places, others]) % len(usual)]
    if task == "causal_lm":
        return {"input_ids": ids_MT, "position_ids": positions_of(tokens), "use_cache": False}
    config = model.config.get_text_config()
    if getattr(config, "eos_token_id", None) is not None:  # encoder-decoders answer at it
        ids_MT[:, -1] = torch.as_tensor(config.eos_token_id).flatten()[0]
    config.pad_token_id = getattr(config, "pad_token_id", None) or 0
    return {"input_ids": ids_MT, "attention_mask": torch.ones_like(ids_MT)}


def positions_of(tokens: int) -> Tensor:
    """Return the positions of two rows of two documents, which restart in each document."""
    return torch.arange(tokens).repeat(2).expand(2, 2 * tokens)


def documents_apart(logits_MTV: Tensor, too_large: float) -> bool | None:
    """Return whether the second document of each of the two rows has the same logits.

    Args:
        logits_MTV: logits of the two rows of ``inputs_of``.
        too_large: part of the change of the first document's logits.

    Returns:
        None if it cannot be told: the logits are not finite, or the first document's do not move.
    """
    moved_T = (logits_MTV[0] - logits_MTV[1]).float().abs().amax(dim=-1)
    own, other = (float(part.max()) for part in moved_T.chunk(2))
    if not (0.0 < own < float("inf") and other < float("inf")):
        return None
    return other <= too_large * own


def rows_of_embedding(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model knows: the rows of its input embedding."""
    embedding: Any = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)  # of a sharded model, the weight is empty
    return int(embedding.weight.shape[0]) if rows is None else int(rows)


def _usual_tokens(model: PreTrainedModel) -> list[int]:
    """Return some token ids that have no special meaning, such as that of an image."""
    rows = rows_of_embedding(model)
    said = {**vars(model.config), **vars(model.config.get_text_config())}
    special = {v for k, v in said.items() if "token" in k and isinstance(v, int)}
    return [i for i in range(min(rows, 4096)) if i not in special] or [0]


def _untrained(model: PreTrainedModel, task: str) -> frozenset[str]:
    """Return the names of modules that a text does not call, and whose parameters get no gradient
    from it; none if it cannot be known."""
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    with suppress(Exception), torch.enable_grad():  # code of any architecture
        model.requires_grad_(True)
        model(**inputs_of(model, task)).logits.float().sum().backward()
        return frozenset(
            name
            for name, module in model.named_modules()
            if name not in called and (own := [*module.parameters(recurse=False)])
            if all(p.grad is None for p in own)
        )
    return frozenset()


def _words_in(model: PreTrainedModel) -> dict[str, str]:
    """Return the settings of a model's modules that are words, such as a kind of attention."""
    return {
        f"{type(module).__name__}.{key}": value
        for module in model.modules()
        for key, value in vars(module).items()
        if isinstance(value, str)
    }


def _switched(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return the first setting that has changed, as text; "" if there is none."""
    changed = (name for name, value in before.items() if after.get(name, value) != value)
    name = next(changed, "")
    return f"{name.rpartition('.')[2]} from {before[name]!r} to {after[name]!r}" if name else ""


class _Lookups(TorchDispatchMode):
    """Dispatch mode of torch that sees which parameters have their rows looked up by position, and
    which are changed.

    Args:
        model: the copy of the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tables: dict[str, Table] = {}
        self.changed: str | None = None
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and id(args[0]) in self._names and func._schema.is_mutable:
            self.changed = self._names[id(args[0])]
        if func in OPERATIONS and id(args[0]) in self._names:
            indices = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor)]
            self._looked_up(args[0], indices[0])
        return func(*args, **(kwargs or {}))

    def _looked_up(self, table: Tensor, indices: Tensor) -> None:
        """Note a table if the rows that are looked up are those of the positions."""
        tokens = 2 * TOKENS
        if indices.numel() not in (tokens, 2 * tokens):
            return
        by_row = indices.reshape(-1, tokens)
        first = int(by_row[0, 0])
        for positions, restarts in ((positions_of(TOKENS), True), (torch.arange(tokens), False)):
            if bool((by_row - positions == first).all()):
                name = self._names[id(table)]
                room = table.shape[0] - first
                self.tables[name] = Table(name=name, room=room, restarts=restarts)


class _WatchedLinear(nn.Linear):
    """Linear that notes when somebody asks for its weight or bias. Its own forward does not."""

    noted: Callable[[], None]
    """Function that is called then."""

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            self.noted()
        return super().__getattr__(name)


@dataclass
class _Seen:
    """Names of linears that ran, and of those whose weight or bias was asked for."""

    ran: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)

    def watch(self, model: PreTrainedModel) -> list[str]:
        """Watch all linears of a copy from now on, and return their names."""
        names = [name for name, _ in _linears(model)]
        head = output_head(model)
        for name, linear in model.named_modules():
            # A head is a site only where its weight is not asked for: Mamba wants its dtype.
            if name not in names and not (name == head and is_plain_linear(linear)):
                continue
            linear.register_forward_hook(lambda *_, name=name: self.ran.add(name))
            linear.__class__ = _WatchedLinear
            object.__setattr__(linear, "noted", partial(self.asked.add, name))
        return names


def _linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Return the names and modules of the linears that may carry an adapter: all but the output
    head."""
    head = output_head(model)
    named = model.named_modules()
    return [(n, m) for n, m in named if n != head and is_plain_linear(m)]


def _run_by_text(model: PreTrainedModel, names: Collection[str], ran: set[str]) -> set[str]:
    """Return the names of the linears that a text may run: those that ran, and experts.

    In a list of modules of which some ran and some did not, those may run for other tokens.
    """
    found = set(ran)
    for outer, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList):
            children = [f"{outer}.{i}." for i in range(len(modules))]
            inside = [{n for n in names if f"{n}.".startswith(child)} for child in children]
            if any(own & found for own in inside):
                found |= set().union(*(own for own in inside if not own & found))
    return found
