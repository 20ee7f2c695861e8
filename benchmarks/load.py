"""Seconds and memory to load a 4-bit model in shards: this project, and PEFT.

    python benchmarks/load.py [--ranks 1 2 4]

The other program is transformers + bitsandbytes + PEFT under ZeRO-3: every rank quantises the whole
model, then DeepSpeed shards it. Both are timed from the end of imports and of group setup up to an
engine that can train LoRA of rank 16 on all linears. They run one after the other on the same
random Llama of 1.1 B parameters, and their times are compared as a ratio. Memory is resident
memory, mapped files included, minus that at the start.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _side_by_side import ZERO3, build, on_ranks  # isort: skip  # sets the path

import torch
from _job import RESULTS, write
from _load_report import plot, report
from _resident import forget_peak, peak_bytes

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
TINY = LLAMA | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
ENGINE = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}

Mark = Callable[[], None]
"""Called once the base is loaded, before the engine is built."""


def main() -> None:
    """Both ways on every number of ranks; figures, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing is written")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        on_this_rank(args.way, args.folder)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, TINY if args.tiny else LLAMA)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for ranks in args.ranks:
            for way in WAYS:
                on_ranks(__file__, "--way", way, "--folder", folder, ranks=ranks)
                result = json.loads((Path(folder) / "found.json").read_text())
                found.setdefault(str(ranks), {})[way] = result
    if args.tiny:
        print(report(found))
        return
    (RESULTS / "load.json").write_text(json.dumps(found, indent=1) + "\n")
    write("load.md", report(found))
    plot(found, RESULTS / "load.png")


def save_model(folder: str, shape: dict[str, Any]) -> None:
    """Random weights, bf16, in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)


def on_this_rank(way: str, folder: str) -> None:
    """One rank's part; rank 0 leaves beside the model what the rank that needed most needed."""
    import_all()
    quiet_others()
    comm.start()
    comm.barrier()
    before, own = forget_peak(), {}
    clock, processor = time.perf_counter(), time.process_time()

    def mark(phase: str = "loading") -> None:
        own[f"{phase}_cpu_s"] = time.process_time() - processor
        own[f"{phase}_peak"] = peak_bytes() - before
        comm.barrier()
        own[f"{phase}_s"] = time.perf_counter() - clock

    own["shard"] = WAYS[way](folder, mark)
    mark("ready")
    own["part_of_largest"] = -(-largest_tensor_bytes(folder) // comm.world_size())
    most = comm.max_over_ranks(torch.tensor(list(own.values()), dtype=torch.float64)).tolist()
    if comm.rank() == 0:
        found = dict(zip(own, most, strict=True))
        (Path(folder) / "found.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def import_all() -> None:
    """What either way would import on its way, so that it counts for neither."""
    import bitsandbytes
    import deepspeed
    import peft
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.models.llama import modeling_llama

    del bitsandbytes, deepspeed, peft, HfDeepSpeedConfig, modeling_llama


def ours(folder: str, loaded: Mark) -> int:
    """Load and build as ``train.run`` does; the bytes of the base's shard."""
    load = Model.load

    def marked(self: Model, *args: Any) -> Any:
        seeds = load(self, *args)
        loaded()
        return seeds

    with patch.object(Model, "load", marked):
        run = build("lora", {}, folder=folder, steps=10, tokens=8, ds_config=ZERO3)
    return shard_bytes(run.engine.model)


def usual(folder: str, loaded: Mark) -> int:
    """transformers, PEFT, DeepSpeed; the bytes of the base's shard."""
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import HfDeepSpeedConfig

    alive_for_transformers = HfDeepSpeedConfig(ENGINE)  # noqa: F841
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=torch.bfloat16
    )
    model.requires_grad_(False)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).to(torch.bfloat16)
    loaded()
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-4), config=ENGINE
    )
    return shard_bytes(engine.module)


WAYS = {"ours": ours, "usual": usual}


def shard_bytes(model: Any) -> int:
    """Of the frozen parameters, on this rank."""
    return sum(p.ds_tensor.nbytes for p in model.parameters() if not p.requires_grad)


def largest_tensor_bytes(folder: str) -> int:
    """In the files."""
    return max(entry.nbytes for entry in CheckpointFiles(Path(folder)).entries.values())


if __name__ == "__main__":
    main()
