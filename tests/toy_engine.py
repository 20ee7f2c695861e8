"""Toy models of awkward sizes under real ZeRO-3, one engine for every case of ``CASES``."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import ModelConfig, TrainConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.zero3.engine import Engine
from sparse_lora_dist.zero3.parameters import ShardBuilder, gathered
from sparse_lora_dist.zero3.shares import Slice

# 3 elements and 1 are less than four ranks; no share of the others is a whole number of rows.
SHAPES = {"three": (3,), "one": (1,), "odd": (5, 7), "wide": (33, 10), "big": (64, 33)}
CASES = [
    {"precision": "fp32", "stage3_param_persistence_threshold": 0},
    {"precision": "bf16", "stage3_param_persistence_threshold": 0, "sub_group_size": 40},
    {"precision": "bf16"},  # the default threshold keeps every tensor of this model whole
    {"precision": "fp32", "sub_group_size": 40},
]
LR, DECAY = 0.01, 0.1


class Part(nn.Module):
    """x -> x * sum(coefficients * weight): the weight's gradient is x * coefficients."""

    def __init__(self, weight: nn.Parameter, coefficients: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.coefficients = coefficients

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.coefficients.to(self.weight.dtype)).float().sum() * x


class Toy(nn.Module):
    """The sum of its parts."""

    def __init__(self, builder: ShardBuilder) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                name: Part(
                    builder.parameter(shape, range_of(initial(shape)), trainable=True),
                    coefficients(shape),
                )
                for name, shape in SHAPES.items()
            }
        )
        self.frozen = builder.parameter((9, 9), lambda start, stop: torch.ones(stop - start))

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.stack([part(x) for part in self.parts.values()]).sum() + 0.0 * self.frozen.sum()
        )


def range_of(whole: Tensor) -> Any:
    return lambda start, stop: whole.flatten()[start:stop]


def initial(shape: tuple[int, ...]) -> Tensor:
    """First values: exact in bf16, all different from their neighbours."""
    return (torch.arange(torch.Size(shape).numel()) % 61 - 30).view(shape) / 64


def coefficients(shape: tuple[int, ...]) -> Tensor:
    """Powers of two, so that bf16 multiplies by them exactly."""
    return 2.0 ** (torch.arange(torch.Size(shape).numel()) % 5 - 2).view(shape)


def inputs(micro_batches: int) -> Tensor:
    """[ranks, micro-batches], each exact in bf16; their mean is not."""
    count = comm.world_size() * micro_batches
    values = 129 * 4.0 ** -(torch.arange(count) % 3) + torch.arange(count)
    return values.bfloat16().float().view(comm.world_size(), micro_batches)


class Recording(SparseAdamW):
    """Remembers what each call of ``step`` was given: (flat tensor, its gradient)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[list[tuple[Tensor, Tensor]]] = []

    def step(self, closure: Any = None) -> None:
        given = [flat for group in self.param_groups for flat in group["params"]]
        self.calls.append([(flat, flat.grad.clone()) for flat in given])
        super().step()


def toys(
    *, micro_batches: int = 1, clip: float = 0.0, project: Any = None
) -> Iterator[tuple[Engine, Recording, Config]]:
    """An engine over a fresh toy for every case."""
    for case in CASES:
        zero = {k: v for k, v in case.items() if k != "precision"}
        config = Config(
            model=ModelConfig(precision=str(case["precision"])),  # type: ignore[arg-type]
            train=TrainConfig(
                micro_batch_size=1, gradient_accumulation_steps=micro_batches, max_grad_norm=clip
            ),
        )
        engine_config = engine_dict(
            {"zero_optimization": {"stage": 3} | zero}, config, comm.world_size()
        )
        dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
        model = Toy(ShardBuilder(engine_config, dtype))
        trained = [p for p in model.parameters() if p.requires_grad]
        group = {"params": trained, "project": project}
        optimizer = Recording([group], lr=LR, weight_decay=DECAY)
        yield Engine(model, optimizer, engine_config), optimizer, config


def train(engine: Engine, x_N: Tensor) -> None:
    """One optimizer step of these micro-batches."""
    for x in x_N:
        engine.backward(engine(x=x))
        engine.step()


def own_part(piece: Slice, whole: Tensor) -> Tensor:
    return whole.flatten()[piece.start : piece.start + piece.length]


def live_copy(engine: Engine) -> dict[str, Tensor]:
    """What forward uses, whole, by name."""
    with gathered(engine.trained.values()):
        return {name: p.data.clone() for name, p in engine.trained.items()}


def whole_masters(engine: Engine) -> dict[str, Tensor]:
    return {piece.name: whole_of(piece, engine.master(piece)) for piece in engine.slices}


def whole_of(piece: Slice, shard: Tensor) -> Tensor:
    padded = shard.new_zeros(piece.share)
    padded[: piece.length] = shard
    return comm.all_gather_flat(padded, piece.numel).view(piece.shape)


def everything_live(engine: Engine, optimizer: SparseAdamW) -> None:
    for flat in engine.flats():
        optimizer.set_live(flat, torch.ones(flat.shape, dtype=torch.bool))
