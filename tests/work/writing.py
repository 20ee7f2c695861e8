"""A method that writes down whole sites, and what workers run for ``test_rewriter.py``.

Shapes: M rows of a micro-batch, T tokens of a row, N rows of a step, I in_features, O out_features.
"""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lora_dist import methods
from sparse_lora_dist import train as program
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.methods.protocol.form import (
    WEIGHT,
    Form,
    KeptSpec,
    Site,
    Tensors,
    low_rank_delta,
    low_rank_pair,
)
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, NoOptions, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.zero3.engine import summed_cross_entropy
from tests.fixtures.reference import whole_model
from tests.work.run import refusal, train

WRITES = (1, 2, 4)
SEEN: dict[tuple[str, int], dict[str, Tensor]] = {}
"""(site, step) -> what the method was shown in this process."""


def kept_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """LoRA's, and the base's weight once more where bits say so, by numbers kept for each input."""
    bits = tensors["toy_bits"][0].to(x_TI.dtype) - 1  # 0 before anything is written
    again = (x_TI * tensors["toy_row"]) @ tensors[WEIGHT].t() * bits.clamp(min=0)
    return low_rank_delta(x_TI, tensors, scale) + again


def form(site: Site) -> Form:
    """A number an input, an odd number of bytes, a wide integer: all that may lie badly."""
    return Form(
        tensors=low_rank_pair(site),
        kept={
            "toy_row": KeptSpec(shape=(site.in_features,)),
            "toy_bits": KeptSpec(shape=(5,), dtype=torch.uint8),
            "toy_step": KeptSpec(shape=(), dtype=torch.int64),
            "toy_large": KeptSpec(shape=(site.out_features, site.in_features)),
        },
        reads_base=True,
        delta=kept_delta,
        to_lora=None,
    )


def measure(whole: Whole) -> Tensor:
    """Two numbers of a site."""
    return torch.stack([whole.weight_OI().double().norm(), torch.tensor(float(whole.index))])


def write(whole: Whole) -> Rewritten:
    """Keeps what follows from what it sees, and doubles B."""
    w_OI = whole.weight_OI()
    shown = {"weight": w_OI, **{k: t.clone() for k, t in whole.tensors.items()}}
    for name in ("squares_I", "gradient_OI", "rows_NI", "measures_SK"):
        if (t := getattr(whole, name)) is not None:
            shown[name] = t.clone()
    SEEN[whole.site.name, whole.step] = shown
    return Rewritten(
        tensors={
            "toy_row": 0.1 * w_OI.mean(dim=0),
            "toy_bits": torch.tensor([2, 3, 4, 5, 250], dtype=torch.uint8),
            "toy_step": torch.tensor(2**40 + whole.step),
            "toy_large": w_OI * (whole.step + 1),
            "lora_b": whole.tensors["lora_b"] * 2,
        },
        log_values={"norm": float(w_OI.norm())},
    )


def writer(options: NoOptions, plan: RunContext) -> Method:
    """Writes after some steps; the first shows it the base, whose delta is nothing yet."""
    rewriting = Rewriting(
        at=lambda step: step in WRITES,
        write=write,
        measure=measure,
        resets_moments=True,
        squares_decay=0.5,
        collects_gradient=lambda step, index: step == 1 and index % 2 == 0,
        collects_rows=lambda step: step == 1,
    )
    return Method(name="writer", form=form, rewriting=rewriting)


WRITER = MethodFactory(options=NoOptions, build=writer, summary="writes down what it is shown")


def train_writer(flags: list[str]) -> str:
    """The main job, in a program that knows this method too."""
    SEEN.clear()
    with patch.dict(methods.METHODS, {"writer": WRITER}):
        return train(flags)


def shown(flags: list[str]) -> dict[tuple[str, int], dict[str, Tensor]]:
    """What the method saw in a run."""
    train_writer(flags)
    return dict(SEEN)


@dataclass
class Plainly:
    """The same of one step over the base alone, by transformers and autograd."""

    squares_I: Tensor
    gradient_OI: Tensor
    rows_NI: Tensor


def plainly(flags: list[str], site: str) -> Plainly:
    """Of the first step, in one process that has all of its rows."""
    with program.training(load_config(flags)) as now:
        (batch, *others) = now.job.feed.batches(0, 0)
        assert not others
        model = whole_model(now.job.model.folder, quantization="nf4")
        now.job.progress = type(now.job.progress)()
    layer: Any = model.get_submodule(site)
    layer.weight.requires_grad_(True)
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    logits_MTV = model(
        input_ids=batch.input_ids_MT, position_ids=batch.position_ids_MT, use_cache=False
    ).logits
    labels = batch.labels_MT[:, 1:].flatten()
    F.cross_entropy(logits_MTV[:, :-1].flatten(0, 1), labels).backward()
    rows = [x_TI[:length] for x_TI, length in zip(seen[0], batch.lengths_M, strict=True)]
    return Plainly(
        squares_I=torch.cat(rows).double().square().mean(dim=0),
        gradient_OI=layer.weight.grad,
        rows_NI=torch.stack([x_TI.mean(dim=0) for x_TI in rows]),
    )


def refusal_of_infinite(flags: list[str]) -> str:
    """The user error of the main job when its losses are no numbers."""

    def infinite(*args: Any) -> Tensor:
        return summed_cross_entropy(*args) * torch.inf

    with patch("sparse_lora_dist.tasks.loss_head.summed_cross_entropy", infinite):
        return refusal(flags)
