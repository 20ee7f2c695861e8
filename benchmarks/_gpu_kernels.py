"""Parts of ``gpu_check.py`` about single operations: what quantising, reading and attention must
keep, and how long a large weight takes."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _side_by_side import ROOT  # noqa: F401  isort: skip  # sets the path

import bitsandbytes.functional as bnb
import torch
from _gpu_runner import Note
from _rehearsal_train import synchronize
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import quiet_others
from tests.base_model.test_base_model import SHAPES
from tests.fixtures.tiny_models import save_llama
from tests.fixtures.tiny_run import write_tiny_run

WEIGHT, TOKENS = (28672, 8192), 4096
"""The largest linear of the 70B shape, [out_features, in_features]."""
CHOSEN = 0.4
"""Part of a weight's entries below the threshold that is looked for."""


def kernels(note: Note, *, tiny: bool) -> None:
    """Compare shards quantised here with bitsandbytes' of the whole tensor; time a weight."""
    from tests.work import gpu

    quiet_others()
    comm.start()
    for precision in ("bf16", "fp32"):
        count = gpu.quantize_shares(SHAPES, precision)
        assert count == 2 * len(SHAPES), count
        note(shards_equal=count, precision=precision)
    note(**_milliseconds((512, 256) if tiny else WEIGHT, 64 if tiny else TOKENS))
    if comm.on_gpu():
        _loads(note)


def _loads(note: Note) -> None:
    """What the tests marked gpu ask of reading and loading."""
    from tests.work import gpu

    with tempfile.TemporaryDirectory() as place:
        sizes = {"hidden_size": 516, "intermediate_size": 1792, "vocab_size": 1000}
        folder = str(save_llama(Path(place) / "llama", **sizes))
        same, pinned, _ = gpu.read_in_parts(folder)
        assert same
        note(reads_equal=same, pinned_parts=pinned)
        for offload in (False, True):
            load = gpu.load_and_compare(folder, offload=offload)
            most = load["work"] + (load["largest"] if offload else load["shard"]) + 2**20
            note(offload=offload, load=load, allowed_peak=most)
            assert load["peak"] <= most
            assert load["places"] == ["cpu, pinned" if offload else "cuda"]


def _milliseconds(shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """Return the times of operations on a weight of this shape, in bf16 or from 4 bits to it."""
    device = comm.device()
    w_OI = torch.randn(shape, device=device, dtype=torch.bfloat16)
    x_TI = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(w_OI, quant_type="nf4", compress_statistics=True)
    rank = int(CHOSEN * w_OI.numel())
    times = {
        "copy": _each(w_OI.clone),
        "product": _each(lambda: x_TI @ w_OI.t()),
        "dequantise": _each(lambda: bnb.dequantize_4bit(packed, state)),
        "kthvalue": _each(lambda: w_OI.float().flatten().kthvalue(rank), count=1),
        "sort": _each(lambda: w_OI.float().flatten().sort(), count=1),
    }
    return {"weight": shape, "tokens": tokens, "milliseconds": times}


def _each(operation: Callable[[], object], count: int = 10) -> float:
    operation()
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        operation()
    synchronize()
    return round(1000 * (time.perf_counter() - started) / count, 3)


def packing(note: Note, *, tiny: bool) -> None:
    """Change one of three documents in a row: no logits of the others may move, by any attention
    that is installed."""
    from tests.work.run import packed_documents

    quiet_others()
    comm.start()
    with tempfile.TemporaryDirectory() as place:
        run = write_tiny_run(Path(place))
        for attention in attentions():
            rows = 1 if "flash" in attention else 2  # transformers' takes one packed row
            options = {"attn_implementation": attention, "micro_batch_size": rows}
            flags = run.flags(Path(place, attention), precision="bf16", **options)
            found = packed_documents(flags, rows=rows)
            moved = found["changed"]
            other = max(d for c, all_ in moved.items() for i, d in all_.items() if i != c)
            own = min(moved[c][c] for c in moved)
            note(attention=attention, others=other, own=own, unmarked=found["as one document"])
            assert other == 0.0 < own, moved


def attentions() -> list[str]:
    """Return names of attention implementations: torch's, the package of flash attention if it is
    there, and on a GPU those that this project adds to transformers'."""
    added = [
        name
        for name in ALL_ATTENTION_FUNCTIONS.valid_keys()
        if comm.on_gpu()
        and ALL_ATTENTION_FUNCTIONS[name].__module__.startswith("sparse_lora_dist.")
    ]
    flash = ["flash_attention_2"] if is_flash_attn_2_available() else []
    return ["sdpa", "eager", *flash, *added]
