"""What workers run for ``test_head.py``: the same micro-batches with whole logits and without."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import AdapterConfig, ModelConfig, TrainConfig
from sparse_lora_dist.data import NOT_A_TARGET, Batch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.sparsity.sites import Sites
from sparse_lora_dist.tasks import loss_head as head
from sparse_lora_dist.tasks.causal_lm import batch_loss, batch_tally, loss_per_target
from sparse_lora_dist.tasks.loss_head import LossHead
from sparse_lora_dist.training.step import held_out_totals
from sparse_lora_dist.zero3.engine import Engine
from tests.work.base import engine_config_of, small_method

ROWS, TOKENS, CHUNK_ROWS = 2, 48, 7
BatchLoss = Callable[[Engine, Batch], Tensor]


@dataclass
class Found:
    """Of one way to make the loss, on this rank."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """This rank's shard of each, after all micro-batches."""
    held_out: float


@dataclass
class Compared:
    """Both ways, and what the head learnt."""

    chunked: Found
    whole: Found
    operations: int
    refused: str | None
    names: list[str]
    said: str


def compare(
    folder: str, *, chunk_rows: int = CHUNK_ROWS, centred: bool = False, **options: Any
) -> Compared:
    """Losses, gradients, held-out loss of two micro-batches, each way."""
    patched = patch.object(LlamaForCausalLM, "forward", _centred(LlamaForCausalLM.forward))
    with redirect_stdout(io.StringIO()) as said, patched if centred else _nothing():
        engine, loss_head = build(folder, **options)
        vocabulary = engine.model.config.vocab_size
        with patch.object(head, "CHUNK_BYTES", 4 * chunk_rows * vocabulary):
            chunked = _found(engine, batch_loss)
        whole = _found(engine, whole_loss)
    return Compared(
        chunked=chunked,
        whole=whole,
        operations=len(loss_head.after or []) if loss_head else -1,
        refused=loss_head.refused if loss_head else "no head",
        names=[name for name, _ in engine.model.named_parameters()],
        said=said.getvalue(),
    )


def build(
    folder: str,
    *,
    precision: Any = "fp32",
    checkpointing: bool = False,
    train_head: bool = False,
    adapt_head: bool = False,
    **zero: Any,
) -> tuple[Engine, LossHead | None]:
    """An engine over the model, with LoRA on its linears; nothing stays gathered after its use."""
    config = Config(
        model=ModelConfig(model=folder, precision=precision, gradient_checkpointing=checkpointing),
        adapter=AdapterConfig(
            rank=2,
            dropout=0.0,
            target_modules=("lm_head", "q_proj") if adapt_head else "all-linear",
            modules_to_save=("lm_head",) if train_head else (),
        ),
        train=TrainConfig(gradient_accumulation_steps=2, micro_batch_size=ROWS),
    )
    released = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    engine_config = engine_config_of(config, **released, **zero)
    model = Model.open(config)
    model.load(config, small_method(), engine_config)
    optimizer = SparseAdamW(model.param_groups(0.0), lr=0.0, weight_decay=0.0)
    engine = Engine(model.module, optimizer, engine_config)
    sites = Sites(model.adapters, small_method())
    Shards(engine, optimizer, small_method(), sparse=sites.tensors(), sites=sites)
    found = model.module.get_output_embeddings()
    return engine, found if isinstance(found, LossHead) else None


def micro_batch(number: int, vocabulary: int) -> Batch:
    """Random tokens, a third of them no target; one row of rank 0 has none at all."""
    generator = torch.Generator().manual_seed(10 * number + comm.rank())
    ids_MT = torch.randint(3, vocabulary, (ROWS, TOKENS), generator=generator)
    labels_MT = ids_MT.clone()
    labels_MT[torch.rand(ids_MT.shape, generator=generator) < 0.3] = NOT_A_TARGET
    if comm.rank() == 0:
        labels_MT[0] = NOT_A_TARGET
    return Batch(
        input_ids_MT=ids_MT,
        labels_MT=labels_MT,
        position_ids_MT=torch.arange(TOKENS).expand(ROWS, TOKENS),
        rows_M=(0, 1),
        lengths_M=(ids_MT.shape[1],) * len(ids_MT),
    )


def whole_loss(engine: Engine, batch: Batch) -> Tensor:
    """From the model's own logits, all of them."""
    logits_MTV = engine(
        input_ids=batch.input_ids_MT, position_ids=batch.position_ids_MT, use_cache=False
    ).logits
    labels = batch.labels_MT[:, 1:].flatten()
    return F.cross_entropy(logits_MTV[:, :-1].flatten(0, 1).float(), labels, reduction="sum")


def _found(engine: Engine, loss_of: BatchLoss) -> Found:
    vocabulary = engine.model.config.vocab_size
    batches = [micro_batch(number, vocabulary) for number in (1, 2)]
    losses, gradients = [], {}
    for i, batch in enumerate(batches):
        loss = loss_of(engine, batch)
        losses.append(float(loss.detach()))
        engine.backward(loss * 0.125)
        if i == 1:
            gradients = {s.name: engine.gradient(s).clone() for s in engine.slices}
        engine.step()
    with patch("sparse_lora_dist.tasks.causal_lm.batch_loss", loss_of):
        scores = loss_per_target(held_out_totals(engine, batches, batch_tally))
        return Found(losses, gradients, scores["held_out_loss"])


def _centred(usual: Any) -> Any:
    """An architecture that needs all of a token's logits: it takes their mean off."""

    def forward(self: Any, **inputs: Any) -> Any:
        output = usual(self, **inputs)
        if output.logits.shape[-1]:
            output.logits = output.logits - output.logits.mean(-1, keepdim=True)
        return output

    return forward


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# Memory, and how often the head is gathered.


@dataclass
class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside put out, and how many tokens the
    largest had whose rows are as long as the vocabulary."""

    vocabulary: int
    elements: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
                # The head's weight, transposed, is not contiguous.
                if t.dim() > 1 and t.shape[-1] == self.vocabulary and t.is_contiguous():
                    self.tokens = max(self.tokens, t.numel() // self.vocabulary)
        return out


@dataclass
class Costs:
    """Of one micro-batch."""

    largest: dict[str, Largest] = field(default_factory=dict)
    """By phase."""
    gathers: dict[str, int] = field(default_factory=dict)
    """Phase -> how often the head's weight was gathered."""
    targets: int = 0


def costs(folder: str, *, whole: bool = False, **options: Any) -> Costs:
    """What a training micro-batch and a held-out one need, once the head knows its model."""
    engine, _ = build(folder, **options)
    vocabulary = engine.model.config.vocab_size
    batch, loss_of = micro_batch(1, vocabulary), whole_loss if whole else batch_loss
    found = Costs(targets=batch.num_targets)
    with patch.object(head, "CHUNK_BYTES", 4 * CHUNK_ROWS * vocabulary):
        with engine.evaluating():
            loss_of(engine, batch)  # so that the head has learnt
        for phase in ("training", "held out"):
            with _gathers_of_head(engine) as gathers, Largest(vocabulary) as largest:
                if phase == "training":
                    engine.backward(loss_of(engine, batch))
                    engine.step()
                else:
                    with engine.evaluating():
                        loss_of(engine, batch)
            found.largest[phase], found.gathers[phase] = largest, len(gathers)
    return found


@contextmanager
def _gathers_of_head(engine: Engine) -> Iterator[list[int]]:
    """One entry a gather that brings the head's weight."""
    weight: Any = engine.model.get_output_embeddings().weight
    calls: list[int] = []

    def counting(usual: Any) -> Any:
        def call(params: Any, *args: Any, **kwargs: Any) -> Any:
            calls.extend(1 for p in params if p is weight)
            return usual(params, *args, **kwargs)

        return call

    before = {p: p.all_gather_coalesced for p in engine.model.parameters()}
    for p, usual in before.items():
        p.all_gather_coalesced = counting(usual)
    yield calls
    for p, usual in before.items():
        p.all_gather_coalesced = usual
