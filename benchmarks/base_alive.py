"""Bytes of the frozen base that are kept between forward and backward: this project, and PEFT.

    python benchmarks/base_alive.py [--ranks 2]

A random Llama of 8 layers, without activation checkpointing. ZeRO-3 releases a gathered weight
after its use, so weights of the base that exist after forward are kept by autograd. They are
counted twice: by weak references to the storages that forward used, and by walking the graph from
the logits. Both programs train LoRA on all linears with ZeRO-3 that keeps no parameters gathered;
the second program is transformers + bitsandbytes Linear4bit + PEFT.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks._base_storages import Alive, BaseStorages
from benchmarks._job import write

ZERO = {
    "stage": 3,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def ours(folder: str, precision: Literal["bf16", "fp32"] = "bf16") -> Alive:
    """This project's model and engine."""
    from sparse_lora_dist.base_model import nf4
    from sparse_lora_dist.config.config import Config
    from sparse_lora_dist.config.deepspeed_file import engine_dict
    from sparse_lora_dist.config.sections import ModelConfig
    from sparse_lora_dist.distributed import comm
    from sparse_lora_dist.methods.protocol.method import Method
    from sparse_lora_dist.model.model import Model
    from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
    from sparse_lora_dist.zero3.engine import Engine

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
        from sparse_lora_dist.runtime.entry_point import quiet_others

        quiet_others()
        alive = PROGRAMS[args.program](args.folder)
        if os.environ["RANK"] == "0":
            (Path(args.folder) / f"{args.program}.json").write_text(json.dumps(asdict(alive)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        found = {name: run(name, folder, args.ranks) for name in PROGRAMS}
    write("base_alive.md", table(found, args.ranks))


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
