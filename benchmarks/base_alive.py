"""Bytes of the frozen base that are alive between forward and backward: ours, and the usual way.

    python benchmarks/base_alive.py [--ranks 2]

A random Llama of 8 layers, activation checkpointing off. ZeRO-3 releases a gathered weight after
its use; whatever of the base still stands after the forward stands because autograd keeps it.
Counted twice: by weak references to the storages that forward used, and by walking the graph from
the logits. Both programs train LoRA on all linears under ZeRO-3 that keeps nothing gathered; the
usual one is transformers + bitsandbytes Linear4bit + PEFT.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

RESULT = Path(__file__).parent / "results" / "base_alive.md"
ZERO = {
    "stage": 3,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


@dataclass
class Alive:
    """Bytes by kind: linears (packed, scales and dequantised), embeddings and head, norms."""

    used: dict[str, int]
    """Different storages that forward used."""
    alive: dict[str, int]
    """Of those, still there after it."""
    in_graph: dict[str, int]
    """Of those, reached from the logits through autograd's graph."""


@dataclass
class BaseStorages:
    """Every storage of the base that a forward uses, held weakly."""

    seen: list[tuple[str, StorageWeakRef, int]] = field(default_factory=list)

    def add(self, kind: str, t: Tensor) -> None:
        """Remember the storage of ``t``."""
        storage = t.untyped_storage()
        ref = StorageWeakRef(storage)
        if storage.nbytes() and all(ref.cdata != other.cdata for _, other, _ in self.seen):
            self.seen.append((kind, ref, storage.nbytes()))

    @contextmanager
    def watched(self, model: nn.Module, dequantizers: Iterable[tuple[Any, str]]) -> Iterator[None]:
        """Inside, every frozen parameter that a module finds gathered when it runs is added, and
        whatever the functions ``dequantizers`` (owner, name) return."""
        # After the engine's own hooks, which gather: they were there first.
        handles = [
            module.register_forward_pre_hook(partial(self._add_own, kind_of(name)))
            for name, module in model.named_modules()
        ]
        patches = [patch.object(o, n, self._adding(getattr(o, n))) for o, n in dequantizers]
        for p in patches:
            p.start()
        yield
        for p in patches:
            p.stop()
        for handle in handles:
            handle.remove()

    def _add_own(self, kind: str, module: nn.Module, inputs: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                self.add(kind, parameter.data)

    def _adding(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            self.add("linears", out)
            return out

        return call

    def after_forward(self, logits: Tensor) -> Alive:
        """What is left, with the graph still there."""
        kept = {t.untyped_storage()._cdata for t in saved_tensors(logits)}
        # A thread that moved a tensor may let go of it a moment after who waited for it goes on.
        for _ in range(100):
            living = [entry for entry in self.seen if not entry[1].expired()]
            if not any(entry[1].cdata not in kept for entry in living):
                break
            time.sleep(0.02)
        return Alive(
            used=_by_kind(self.seen),
            alive=_by_kind(living),
            in_graph=_by_kind([e for e in living if e[1].cdata in kept]),
        )


def kind_of(module: str) -> str:
    """Which row of the table the parameters of a module belong to."""
    if "norm" in module:
        return "norms"
    return "embeddings and head" if "embed" in module or "lm_head" in module else "linears"


def _by_kind(entries: Iterable[tuple[str, StorageWeakRef, int]]) -> dict[str, int]:
    sums = {"linears": 0, "embeddings and head": 0, "norms": 0}
    for kind, _, size in entries:
        sums[kind] += size
    return sums


def saved_tensors(output: Tensor) -> Iterator[Tensor]:
    """Every tensor that the graph of ``output`` holds for backward."""
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        yield from _tensors([getattr(node, n) for n in dir(node) if n.startswith("_saved_")])
        # Of functions written in Python: what was saved, and what was just left on the context.
        yield from _tensors(getattr(node, "saved_tensors", ()))
        yield from _tensors(list(getattr(node, "__dict__", {}).values()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def ours(folder: str, precision: Literal["bf16", "fp32"] = "bf16") -> Alive:
    """This project's model and engine."""
    from sparse_lora_dist import comm
    from sparse_lora_dist.base_model import nf4
    from sparse_lora_dist.config import Config, ModelConfig
    from sparse_lora_dist.engine_config import engine_dict
    from sparse_lora_dist.methods.base import Method
    from sparse_lora_dist.model import Model
    from sparse_lora_dist.optim import SparseAdamW
    from sparse_lora_dist.zero3 import Engine

    comm.start()
    method = Method(name="lora")
    config = Config(model=ModelConfig(model=folder, precision=precision))
    engine_config = engine_dict({"zero_optimization": ZERO}, config, comm.world_size())
    model = Model.open(config)
    model.load(config, method, engine_config)
    optimizer = SparseAdamW(model.trainable(), lr=0.0, weight_decay=0.0)
    engine = Engine(model.module, optimizer, engine_config)
    storages = BaseStorages()
    with storages.watched(model.module, [(nf4, "dequantize")]):
        logits = engine(input_ids=tokens(), use_cache=False).logits
    alive = storages.after_forward(logits)
    engine.backward(logits.float().mean())
    return alive


def usual(folder: str) -> Alive:
    """transformers + bitsandbytes + PEFT, as their documentation has it for ZeRO-3."""
    import bitsandbytes.functional as bnb
    import deepspeed
    import deepspeed.ops
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import HfDeepSpeedConfig

    engine_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": ZERO,
        "zero_allow_untested_optimizer": True,
    }
    # Its shared-memory all-reduce would be compiled for a minute first; ZeRO-3 does not call it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    alive_for_transformers = HfDeepSpeedConfig(engine_config)  # noqa: F841
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
    )
    model.requires_grad_(False)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config)
    engine.train()
    storages = BaseStorages()
    with storages.watched(model, [(bnb, "dequantize_4bit")]):
        logits = engine(input_ids=tokens().to(engine.device), use_cache=False).logits
    alive = storages.after_forward(logits)
    engine.backward(logits.float().mean())
    return alive


def tokens() -> Tensor:
    """One row."""
    return torch.randint(0, 100, (1, 64), generator=torch.Generator().manual_seed(0))


PROGRAMS = {"ours": ours, "usual": usual}


def main() -> None:
    """Make the model, run each program on its ranks, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        from sparse_lora_dist.program import quiet_others

        quiet_others()
        alive = PROGRAMS[args.program](args.folder)
        if os.environ["RANK"] == "0":
            (Path(args.folder) / f"{args.program}.json").write_text(json.dumps(asdict(alive)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        found = {name: run(name, folder, args.ranks) for name in PROGRAMS}
    text = table(found, args.ranks)
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text + "\n")


def save_model(folder: str) -> None:
    """8 layers of width 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def run(program: str, folder: str, ranks: int) -> dict[str, dict[str, int]]:
    """One program on its own ranks; what rank 0 saw."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    subprocess.run([sys.executable, *command, "--program", program, "--folder", folder], check=True)
    return json.loads((Path(folder) / f"{program}.json").read_text())  # type: ignore[no-any-return]


def table(found: dict[str, dict[str, dict[str, int]]], ranks: int) -> str:
    """Markdown."""
    lines = [
        "# Bytes of the base alive between forward and backward",
        "",
        "Llama, 8 layers of width 512, NF4 with double quantisation, bf16, LoRA on all linears, no",
        f"activation checkpointing, ZeRO-3 on {ranks} ranks that keeps nothing gathered; bytes per",
        "rank.",
        f"`python benchmarks/base_alive.py --ranks {ranks}`",
        "",
        "| | part of the base | used by forward | alive after it | reached from the graph |",
        "|---|---|---:|---:|---:|",
    ]
    names = {"ours": "sparse_lora_dist", "usual": "transformers + bitsandbytes + PEFT"}
    for program, result in found.items():
        for kind in result["used"]:
            numbers = [f"{result[key][kind]:,}" for key in ("used", "alive", "in_graph")]
            lines.append(f"| {names[program]} | {kind} | {' | '.join(numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
