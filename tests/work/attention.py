"""What workers run for ``test_packed_attention.py``: runs whose kernel is a loop, on the CPU."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.model import attention
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.tasks import packed_attention
from tests.fixtures.plain_attention import attention_by_loop
from tests.work.run import train


@dataclass
class Call:
    """One call of the kernel."""

    training: bool
    bounds: int
    """Number of the tensor of bounds, which is kept so that no other gets it."""


@dataclass
class Trained:
    """A run."""

    losses: list[float]
    held_out: list[float]
    kernel_calls: list[Call]


def trained(flags: list[str], *, by_lengths: bool = False) -> Trained:
    """Train with sdpa or, as if this were a GPU, with attention by lengths."""
    calls: list[Call] = []
    kept: list[Tensor] = []
    loaded: list[Model] = []
    load = Model.load

    def loop(*args: Any, **named: Any) -> Tensor:
        kept.append(args[3])
        calls.append(Call(training=torch.is_grad_enabled(), bounds=id(args[3])))
        return attention_by_loop(*args, **named)

    def loads(self: Model, *args: Any, **named: Any) -> Any:
        loaded.append(self)
        return load(self, *args, **named)

    with ExitStack() as patches:
        if by_lengths:
            for owner, name, value in (
                (packed_attention, "varlen_attn", loop),
                (packed_attention, "_has_kernel", lambda q: bool(loaded)),
                (Model, "load", loads),
                (attention, "barred_by_options", lambda *_, **__: ""),
                (attention, "why_no_kernel", lambda *_: None),
            ):
                patches.enter_context(patch.object(owner, name, value))
        train(flags)
    records = read_records(Path(load_config(flags).run.output_dir) / "metrics.jsonl")
    return Trained(
        losses=[record["loss"] for record in records if record["step"] > 0],
        held_out=[record["held_out_loss"] for record in records if "held_out_loss" in record],
        kernel_calls=calls,
    )
