"""What workers run for ``test_zero3_contract.py``: one function a fact."""

from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.comm.torch import TorchBackend

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import ModelConfig, TrainConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.zero3.engine import Engine
from sparse_lora_dist.zero3.parameters import ShardBuilder, gathered
from sparse_lora_dist.zero3.slices import TensorSlice
from tests.fixtures.toy_engine import (
    DECAY,
    LR,
    SHAPES,
    Recording,
    Toy,
    coefficients,
    everything_live,
    initial,
    inputs,
    live_copy,
    own_part,
    range_of,
    toys,
    train,
    whole_masters,
)


def positions() -> list[int]:
    """A slice lies where DeepSpeed's public accessor finds it, and holds the first values; flat
    tensors of each case."""
    counts = []
    for engine, _, _ in toys():
        assert {p.name: p.shape for p in engine.slices} == {
            f"parts.{name}.weight": shape for name, shape in SHAPES.items()
        }
        for component in engine.slices:
            master = engine.master(component)
            theirs = deepspeed.utils.safe_get_local_fp32_param(engine.trained[component.name])
            assert theirs.numel() == component.share == -(-component.numel // comm.world_size())
            flat = engine.flats()[component.flat]
            assert flat.dtype == torch.float32 and flat.ndim == 1
            assert theirs.data_ptr() == flat.data_ptr() + 4 * component.offset, component
            assert torch.equal(theirs[: component.length], master)
            assert torch.equal(master, own_part(component, initial(component.shape)))
        lengths = [_summed(component.length) for component in engine.slices]
        assert lengths == [component.numel for component in engine.slices]
        if comm.rank() == 3:
            assert _by_name(engine, "one").length == _by_name(engine, "three").length == 0
        reserved = [sum(p.share for p in engine.slices if p.flat == i) for i in _indices(engine)]
        assert all(n <= flat.numel() for n, flat in zip(reserved, engine.flats(), strict=True)), (
            "shares of one flat tensor fit into it"
        )
        counts.append(len(engine.flats()))
    return counts


def _indices(engine: Engine) -> range:
    return range(len(engine.flats()))


def _by_name(engine: Engine, name: str) -> TensorSlice:
    return next(p for p in engine.slices if p.name == f"parts.{name}.weight")


def _summed(n: int) -> int:
    return int(comm.sum_over_ranks(torch.tensor(n)))


def gradients() -> None:
    """At the boundary a gradient is the fp32 mean over ranks and micro-batches, not clipped; inside
    ``step`` it is clipped."""
    for engine, optimizer, _ in toys(micro_batches=4, clip=1e-3):
        everything_live(engine, optimizer)
        for step in range(2):
            x_RN = inputs(4) * 2**step  # 1 / 4 is exact in bf16, which scales the loss
            for x in x_RN[comm.rank()][:-1]:
                engine.backward(engine(x=x))
                engine.step()
            engine.backward(engine(x=x_RN[comm.rank()][-1]))
            expected = {p.name: coefficients(p.shape) * x_RN.mean() for p in engine.slices}
            for component in engine.slices:
                grad = engine.gradient(component)
                assert grad.dtype == torch.float32 and grad.shape == (component.length,)
                want = own_part(component, expected[component.name])
                torch.testing.assert_close(grad, want, rtol=1e-6, atol=0)
            engine.step()
            norm = torch.cat([g.flatten() for g in expected.values()]).norm()
            torch.testing.assert_close(torch.tensor(engine.gradient_norm()), norm)
            clipped = [grad for call in optimizer.calls for _, grad in call]
            optimizer.calls.clear()
            total = comm.sum_over_ranks(torch.stack([g.square().sum() for g in clipped]).sum())
            torch.testing.assert_close(total.sqrt(), torch.tensor(1e-3), rtol=1e-4, atol=0)


def steps() -> list[int]:
    """``optimizer.step`` is called once for each flat tensor, with that one alone, and never by
    ``initialize``; calls in each case."""
    counts = []
    for engine, optimizer, _ in toys(micro_batches=2):
        assert not optimizer.calls
        everything_live(engine, optimizer)
        x_N = inputs(2)[comm.rank()]
        engine.backward(engine(x=x_N[0]))
        engine.step()
        assert not optimizer.calls, "no step before the accumulation boundary"
        engine.backward(engine(x=x_N[1]))
        engine.step()
        given = [[flat for flat, _ in call] for call in optimizer.calls]
        assert [len(call) for call in given] == [1] * len(engine.flats())
        assert all(call[0] is flat for call, flat in zip(given, engine.flats(), strict=True)), (
            "the same objects that state is kept by"
        )
        assert not [p for group in optimizer.param_groups for p in group["params"]]
        assert [optimizer.state[flat]["step"] for flat in engine.flats()] == [1] * len(given)
        engine.set_learning_rate(lambda born: 0.0)
        before = whole_masters(engine)
        train(engine, x_N)
        after = whole_masters(engine)
        assert all(torch.equal(before[name], after[name]) for name in before)
        counts.append(len(given))
    return counts


def projections() -> None:
    """What ``project`` does inside the step is in the live copy right after it."""
    for engine, optimizer, _ in toys(project=lambda w, update: torch.where(w.abs() < 0.2, 0.0, w)):
        everything_live(engine, optimizer)
        for _ in range(2):
            train(engine, inputs(1)[comm.rank()])
            masters, live = whole_masters(engine), live_copy(engine)
            for name, master in masters.items():
                assert torch.equal(live[name], master.to(live[name].dtype))
            zeros = sum(int((master == 0).sum()) for master in masters.values())
            assert 0 < zeros < sum(master.numel() for master in masters.values())


def written_masters() -> None:
    """Masters written from outside reach forward, before the first step and after one."""
    for engine, optimizer, config in toys():
        everything_live(engine, optimizer)
        for value in (1.0, 3.0):
            wholes = {p.name: initial(p.shape) * 2 + value for p in engine.slices}
            for component in engine.slices:
                engine.master(component).copy_(own_part(component, wholes[component.name]))
            engine.masters_changed()
            dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
            with engine.evaluating():
                said = engine(x=torch.tensor(1.0))
            expected = [
                (w.to(dtype) * coefficients(tuple(w.shape)).to(dtype)).float().sum()
                for w in wholes.values()
            ]
            torch.testing.assert_close(said, torch.stack(expected).sum(), rtol=1e-6, atol=1e-6)
            for name, whole in live_copy(engine).items():
                assert torch.equal(whole, wholes[name].to(dtype)), name
            train(engine, inputs(1)[comm.rank()])
            for name, whole in whole_masters(engine).items():
                # The first update of AdamW is lr in size, whatever the gradient.
                moved = (whole - wholes[name] * (1 - LR * DECAY)).abs()
                assert moved.max() <= 1.1 * LR and (whole != wholes[name]).all(), name


def gathers() -> list[int]:
    """Exchanges that make tensors whole, in a step of each case once DeepSpeed knows the order."""
    counts = []
    for engine, optimizer, _ in toys():
        everything_live(engine, optimizer)
        for _ in range(3):
            train(engine, inputs(1)[comm.rank()])
        whole = TorchBackend.all_gather_into_tensor
        with patch.object(TorchBackend, "all_gather_into_tensor", autospec=True) as exchange:
            exchange.side_effect = whole
            train(engine, inputs(1)[comm.rank()])
        counts.append(exchange.call_count)
    return counts


def shared_memory_off() -> bool:
    """DeepSpeed's compiled all-reduce for CPU is not in use."""
    engine, _, _ = next(toys())
    assert engine is not None
    return (
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
        and deepspeed.comm.comm.cdb.shm_comm_op is None
    )


def bytes_survive() -> None:
    """Every bit pattern, NaNs among them, comes back from a gather as it was put in: alone, with
    others in one bucket, and after training."""
    for dtype, words in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
        precision: Any = "bf16" if dtype == torch.bfloat16 else "fp32"
        config = Config(
            model=ModelConfig(precision=precision), train=TrainConfig(micro_batch_size=1)
        )
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        engine_config = engine_dict({"zero_optimization": zero}, config, comm.world_size())
        builder = ShardBuilder(engine_config, dtype)
        patterns = torch.arange(2**16) * (2**16 + 1 if dtype == torch.float32 else 1)
        raw = patterns.to(words).view(dtype)
        model = Toy(builder)
        model.packed = builder.parameter((2**16,), range_of(raw))
        model.scales = builder.parameter((2**16 - 7,), range_of(raw[7:]))
        optimizer = Recording(
            [p for p in model.parameters() if p.requires_grad],
            lr=LR,
            weight_decay=DECAY,
        )
        engine = Engine(model, optimizer, engine_config)
        everything_live(engine, optimizer)
        for parameters in ([model.packed], [model.packed, model.scales]):
            train(engine, inputs(1)[comm.rank()])
            with gathered(parameters):
                for parameter, bits in zip(parameters, (raw, raw[7:]), strict=False):
                    assert parameter.dtype == dtype
                    assert torch.equal(parameter.data.view(words), bits.view(words)), dtype
        if comm.world_size() == 1:  # it has kept them gathered
            continue
        # As forward's prefetch gathers: several parameters in one bucket.
        model.packed.all_gather_coalesced([model.packed, model.scales]).wait()
        assert torch.equal(model.packed.data.view(words), raw.view(words)), dtype
        assert torch.equal(model.scales.data.view(words), raw[7:].view(words)), dtype
        model.packed.partition([model.packed, model.scales])
