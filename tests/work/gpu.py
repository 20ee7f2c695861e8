"""What workers run for ``test_gpu_load.py``."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model import safetensors_reader as checkpoint_files
from sparse_lora_dist.base_model.frozen_linear import QuantLinear
from sparse_lora_dist.base_model.nf4_shard import own_weights, quantized_parameters
from sparse_lora_dist.base_model.prefetch import Range, read_ahead
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Source
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.zero3.parameters import ShardBuilder, gathered
from tests.work.base import (
    DTYPES,
    compare_with_bitsandbytes,
    config_of,
    engine_config_of,
    quantized_linears,
    small_method,
    whole_weights,
)


def quantize_shares(shapes: list[tuple[int, int]], precision: str) -> int:
    """Each shape from memory of the GPU, gathered and compared; how many were."""
    config = config_of(precision=precision)
    builder = ShardBuilder(engine_config_of(config), DTYPES[precision])
    count = 0
    for shape in shapes:
        generator = torch.Generator().manual_seed(shape[0])
        w_OI = torch.randn(shape, generator=generator).bfloat16().to(comm.device())
        for double_quant in (False, True):
            layout = nf4.Layout(shape=shape, double_quant=double_quant)
            start, stop = own_weights(layout, builder.dtype)
            own = w_OI.flatten()[start:stop].clone()
            packed, scales = quantized_parameters(own, layout, builder)
            with gathered([packed, scales]):
                compare_with_bitsandbytes(QuantLinear(layout, (packed, scales), None), w_OI)
            count += 1
    return count


def read_in_parts(folder: str) -> tuple[bool, int, str]:
    """(is an odd range of every tensor the same as on the CPU?, pinned parts, where it lies)."""
    files = CheckpointFiles(Path(folder))
    ranges = [
        Range(Source(keys=(k,), parts=(e,), dtype=torch.bfloat16), 3, e.nbytes // 2 - 5)
        for k, e in files.entries.items()
    ]
    fill, components = CheckpointFiles._fill, 0

    def counted(self: CheckpointFiles, out: Tensor, source: Source, start: int) -> None:
        nonlocal components
        components += out.is_pinned()
        fill(self, out, source, start)

    with (
        patch.object(checkpoint_files, "BLOCK_BYTES", 4098),
        patch.object(CheckpointFiles, "_fill", counted),
    ):
        found = list(read_ahead(files, ranges, comm.device()))
    same = [torch.equal(t.cpu(), files.read(*r)) for t, r in zip(found, ranges, strict=True)]
    return all(same), components, str(found[0].device)


def load_and_compare(folder: str, offload: bool = False) -> dict[str, Any]:
    """Load, compare every linear with bitsandbytes on the GPU; what this rank held, in bytes."""
    config = config_of(model=folder)
    away = {"offload_param": {"device": "cpu", "pin_memory": True}} if offload else {}
    engine_config = engine_config_of(config, **away)
    model = Model.open(config)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.load(config, small_method(), engine_config)
    peak = torch.cuda.max_memory_allocated() - before
    shares: Any = [p.ds_tensor for p in model.module.parameters()]
    whole, linears = whole_weights(folder), quantized_linears(model)
    for name, layer in linears.items():
        with gathered([layer.weight, layer.scales]):
            compare_with_bitsandbytes(layer, whole[f"{name}.weight"].to(comm.device()))
    largest = max(t.nbytes for t in whole.values()) // comm.world_size() + 4096
    scales = max(t.numel() for t in whole.values()) // nf4.BLOCK * 4
    others = [i for i in range(torch.cuda.device_count()) if i != comm.device().index]
    return {
        "linears": len(linears),
        "peak": peak,
        "shard": sum(t.nbytes for t in shares),
        # This one and the next as they are read, the share that is made, and vectors of scales.
        "work": 3 * largest + 6 * scales,
        "largest": largest,
        "places": sorted({_place(t) for t in shares}),
        "elsewhere": sum(torch.cuda.memory_allocated(i) for i in others),
    }


def _place(share: Tensor) -> str:
    return share.device.type + (", pinned" if share.is_pinned() else "")
