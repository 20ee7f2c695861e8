"""The timed parts of ``gpu_check.py``: training steps of this project and of PEFT.

One process, one GPU, random weights made on the device: of the base files only headers are read. A
base of PEFT's has the modules that transformers and bitsandbytes would make of such files, with the
same adapter, in bf16. All train with activation checkpointing, on the same random rows.
"""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

from _side_by_side import ROOT, build  # isort: skip  # sets the path

import torch
from _gpu_runner import Note
from _rehearsal_train import random, synchronize
from _sparse_checkpoint import save
from _usual_way import Peft, with_lora
from torch import nn
from transformers import LlamaConfig

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import quiet_others
from sparse_lora_dist.zero3.engine import check_loss_kernel

SHAPES = {
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512),
}
"""Llama-3's: width, width of the MLP, layers, heads, heads of keys and values, vocabulary."""
RANK = 16
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    # A decision at every second step.
    "roselora": {"roselora_begin": 0.0, "roselora_every": 2, "roselora_keep": 0.1},
    "adalora": {"adalora_begin": 0.0, "adalora_every": 2},
}
SCHEDULE = 20
"""Steps that a method believes in; so many that each step measured is in the midst of it."""
WARM_UP = 2
SHORT_TOKENS, SHORT_STEPS = 16, 2
"""Steps whose time on a GPU is the host's: Python, and launches of kernels on small tensors."""
TINY = {"shape": "tiny", "tokens": 16, "steps": 3}


def config_of(shape: str) -> LlamaConfig:
    """Return the configuration of a model of this shape."""
    width, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )


def ours(note: Note, *, tiny: bool, **case: Any) -> None:
    """Time this project's steps; see ``_ours``."""
    quiet_others()
    comm.start()
    check_loss_kernel()
    _ours(note, **case | TINY if tiny else case)


def _ours(
    note: Note,
    *,
    shape: str,
    tokens: int,
    steps: int,
    engine: str = "zero3",
    methods: Sequence[str] = ("lora",),
    rows: Sequence[int] = (1,),
    documents: int = 1,
    cap_bytes: int | None = None,
) -> None:
    """Time every method with every number of rows.

    Args:
        note: appends a record.
        shape: of the base, a key of SHAPES.
        tokens: of a row.
        steps: how many.
        engine: name of the DeepSpeed file.
        methods: keys of METHODS.
        rows: of a micro-batch.
        documents: packed into a row.
        cap_bytes: device memory at most.
    """
    if cap_bytes and comm.on_gpu():
        all_bytes = torch.cuda.get_device_properties(comm.device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap_bytes / all_bytes, 1.0))
    for method in methods:
        for count in rows:
            started = time.perf_counter()
            run = _build(method, shape, engine=engine, rows=count, tokens=tokens)
            run.documents = documents
            case = {"way": method, "engine": engine, "shape": shape, "rows": count}
            case["documents"] = documents
            note(**case, load_s=round(time.perf_counter() - started, 1), **_timed(run, steps))
            run.engine.close()
            del run
            _forget()


def _build(method: str, shape: str, *, engine: str, rows: int, tokens: int) -> Any:
    """Return a run on a base of this shape."""
    with tempfile.TemporaryDirectory() as folder, patch.object(CheckpointFiles, "read", random):
        save(Path(folder), config_of(shape), only_holes=True)
        return build(
            method,
            METHODS[method],
            folder=folder,
            steps=SCHEDULE,
            tokens=tokens,
            rows=rows,
            rank=RANK,
            ds_config=str(ROOT / "ds_configs" / f"{engine}.json"),
            gradient_checkpointing=True,
        )


def peft(note: Note, *, tiny: bool, **case: Any) -> None:
    """Time PEFT's steps without DeepSpeed; see ``_peft``."""
    _peft(note, **case | TINY if tiny else case)


def _peft(note: Note, *, shape: str, tokens: int, steps: int, rows: Sequence[int] = (1,)) -> None:
    """Time every number of rows, on one base."""
    started = time.perf_counter()
    device = torch.device("cuda" if comm.on_gpu() else "cpu")
    base = random_base(config_of(shape), device)
    model = with_lora(base, dtype=torch.bfloat16, rank=RANK, gradient_checkpointing=True)
    load_s = round(time.perf_counter() - started, 1)
    for count in rows:
        run = Peft(model, rows=count, tokens=tokens)
        case = {"way": "peft", "engine": None, "shape": shape, "rows": count, "documents": 1}
        note(**case, load_s=load_s, **_timed(run, steps))
        del run
        _forget()


def random_base(config: LlamaConfig, device: torch.device) -> Any:
    """Return what ``from_pretrained`` makes with a ``BitsAndBytesConfig``, with random weights."""
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM

    def numbers(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, dtype=torch.bfloat16, device=device).mul_(0.02)

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    nf4 = {"quant_type": "nf4", "compress_statistics": True}
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            sizes = linear.in_features, linear.out_features
            packed: Any = Linear4bit(
                *sizes, bias=False, compute_dtype=torch.bfloat16, device="meta", **nf4
            )
            weight = Params4bit(numbers(linear.weight), requires_grad=False, **nf4)
            packed.weight = weight.to(device)  # quantises
            model.set_submodule(name, packed)
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:
                setattr(module, name, nn.Parameter(numbers(tensor), requires_grad=False))
    model.is_loaded_in_4bit = True  # PEFT takes its own linear for it then
    return model.to(device)


def _timed(run: Any, steps: int) -> dict[str, Any]:
    """Figures of so many steps, the first of which are not counted, and of a few short ones."""
    if comm.on_gpu():
        torch.cuda.reset_peak_memory_stats()
    wall, host, losses = _seconds(run.step, range(1, steps + 1))
    rows_tokens = run.rows * run.tokens
    found = {
        "tokens": run.tokens,
        "tokens_per_s": round(rows_tokens / mean(wall[WARM_UP:]), 1),
        "step_s": [round(s, 4) for s in wall],
        "host_s": round(mean(host[WARM_UP:]), 3),
        "peak_bytes": torch.cuda.max_memory_allocated() if comm.on_gpu() else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if comm.on_gpu() else None,
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "finite": all(map(math.isfinite, losses)),
    }
    run.tokens, run.rows = SHORT_TOKENS, 1
    wall, _, _ = _seconds(run.step, range(steps + 1, steps + 1 + SHORT_STEPS))
    return found | {"short_step_s": round(min(wall[1:]), 4)}


def _seconds(
    step: Callable[[int], float], numbers: range
) -> tuple[list[float], list[float], list[float]]:
    """Of each step: seconds, processor seconds of this process, loss.

    A host that waits for the GPU spins, so its processor seconds are never less than what it waits.
    """
    wall, host, losses = [], [], []
    for number in numbers:
        synchronize()
        clock, processor = time.perf_counter(), time.process_time()
        losses.append(step(number))
        synchronize()
        wall.append(time.perf_counter() - clock)
        host.append(time.process_time() - processor)
    return wall, host, losses


def _forget() -> None:
    """Give back what the last run held."""
    gc.collect()
    if comm.on_gpu():
        torch.cuda.empty_cache()
