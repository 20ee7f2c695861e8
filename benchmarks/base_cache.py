"""Seconds to load a base: quantised from its original files, and read from the base cache.

    python benchmarks/base_cache.py [--ranks 1 2 4] [--repeats 3] [--tiny]

Timed are ``Model.open`` and ``Model.load``: from the command line to a sharded base with adapters.
Each job loads three times per repeat: without a cache, with a cache that has to be written, and
from the cache.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _side_by_side import ZERO3, on_ranks  # isort: skip  # sets the path

import torch
from _job import header, write

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import ModelConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.protocol.method import Method
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
GB = 1e9
Found = dict[str, float]
"""Medians of seconds and of all ranks' CPU seconds, by way; bytes of the files."""


def main() -> None:
    """All numbers of ranks, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing is written")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        on_this_rank(Path(args.folder), args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, TINY if args.tiny else LLAMA)
        found: dict[int, Found] = {}
        for ranks in args.ranks:
            repeats = ["--repeats", str(args.repeats)]
            on_ranks(__file__, "--folder", folder, *repeats, ranks=ranks)
            found[ranks] = json.loads((Path(folder) / "found.json").read_text())
    text = report(found, args.repeats)
    print(text) if args.tiny else write("base_cache.md", text)


def save_model(folder: str, shape: dict[str, Any]) -> None:
    """Random weights, bf16, in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder, max_shard_size="500MB")


def on_this_rank(folder: Path, repeats: int) -> None:
    """One rank's part; rank 0 leaves what was found beside the model."""
    quiet_others()
    comm.start()
    cache = folder / "cache"
    ways = {"without": None, "writing": cache, "from": cache}
    costs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        if comm.rank() == 0:
            shutil.rmtree(cache, ignore_errors=True)
        for way, place in ways.items():
            costs[way].append(load(folder, place))
    if comm.rank() == 0:
        found: Found = {}
        for way, seen in costs.items():
            seconds, cpu = zip(*seen, strict=True)
            found |= {way: statistics.median(seconds), f"{way} cpu": statistics.median(cpu)}
        found["original"] = size_of(folder)
        found["cache"] = size_of(next(cache.iterdir()))
        (folder / "found.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def load(folder: Path, cache: Path | None) -> tuple[float, float]:
    """Seconds until every rank has its shard, and CPU seconds of all ranks."""
    comm.barrier()
    started, cpu = time.perf_counter(), time.process_time()
    config = Config(model=ModelConfig(model=str(folder), base_cache=str(cache) if cache else None))
    model = Model.open(config)
    model.load(config, Method(name="lora"), engine_dict(ZERO3, config, comm.world_size()))
    cpu = time.process_time() - cpu
    comm.barrier()
    seconds = time.perf_counter() - started
    return seconds, sum(comm.gather_objects(cpu))


def size_of(folder: Path) -> int:
    """Bytes of its weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def report(found: dict[int, Found], repeats: int) -> str:
    """The result file."""
    names = ("time", "CPU time of all ranks", "time, writing it too / without")
    lines = header(*names, first="original / cache, ranks")
    for ranks, costs in found.items():
        ratios = [costs["without"] / costs["from"], costs["without cpu"] / costs["from cpu"]]
        ratios.append(costs["writing"] / costs["without"])
        lines.append(f"| {ranks} | {' | '.join(f'{ratio:.1f}' for ratio in ratios)} |")
    sizes = next(iter(found.values()))
    table = "\n".join(lines)
    return f"""\
`python benchmarks/base_cache.py`: loading a random Llama of 1.1 B parameters in bf16
({sizes["original"] / GB:.2f} GB of files) to an NF4 base sharded by ZeRO-3 with adapters, and the
same from its cache ({sizes["cache"] / GB:.2f} GB); {os.cpu_count()} cores, one thread a rank, files
in the page cache, {repeats} of each.

{table}"""


if __name__ == "__main__":
    main()
