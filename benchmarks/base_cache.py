"""Seconds to load a base: quantised from its original files, and from its cache.

    python benchmarks/base_cache.py [--ranks 1 2 4] [--tiny]

Loading is ``Model.open`` and ``Model.load``: from a command line to a sharded base with adapters.
Three loads in every job: without a cache, with one that has to be written, and from it.
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

from sparse_lora_dist import comm
from sparse_lora_dist.config import Config, ModelConfig
from sparse_lora_dist.engine_config import engine_dict
from sparse_lora_dist.methods.base import Method
from sparse_lora_dist.model import Model
from sparse_lora_dist.program import leave, quiet_others

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
REPEATS = 3
GB = 1e9
Found = dict[str, float]


def main() -> None:
    """All numbers of ranks, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing is written")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        on_this_rank(Path(args.folder))
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, TINY if args.tiny else LLAMA)
        found: dict[int, Found] = {}
        for ranks in args.ranks:
            on_ranks(__file__, "--folder", folder, ranks=ranks)
            found[ranks] = json.loads((Path(folder) / "found.json").read_text())
    text = report(found)
    print(text) if args.tiny else write("base_cache.md", text)


def save_model(folder: str, shape: dict[str, Any]) -> None:
    """Random weights, bf16, in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder, max_shard_size="500MB")


def on_this_rank(folder: Path) -> None:
    """One rank's part; rank 0 leaves what was found beside the model."""
    quiet_others()
    comm.start()
    cache = folder / "cache"
    seconds: dict[str, list[float]] = {"without": [], "writing": [], "from": []}
    for _ in range(REPEATS):
        if comm.rank() == 0:
            shutil.rmtree(cache, ignore_errors=True)
        seconds["without"].append(load(folder, None))
        seconds["writing"].append(load(folder, cache))
        seconds["from"].append(load(folder, cache))
    if comm.rank() == 0:
        found: Found = {way: statistics.median(times) for way, times in seconds.items()}
        found["original"] = size_of(folder)
        found["cache"] = size_of(next(cache.iterdir()))
        (folder / "found.json").write_text(json.dumps(found))
    comm.barrier()
    leave(0)


def load(folder: Path, cache: Path | None) -> float:
    """Seconds until every rank has its shard."""
    comm.barrier()
    started = time.perf_counter()
    config = Config(model=ModelConfig(model=str(folder), base_cache=cache and str(cache)))
    model = Model.open(config)
    model.load(config, Method(name="lora"), engine_dict(ZERO3, config, comm.world_size()))
    comm.barrier()
    return time.perf_counter() - started


def size_of(folder: Path) -> int:
    """Bytes of its weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def report(found: dict[int, Found]) -> str:
    """The result file."""
    lines = header("without / from the cache", "writing it too / without", first="ranks")
    for ranks, times in found.items():
        ratios = times["without"] / times["from"], times["writing"] / times["without"]
        lines.append(f"| {ranks} | {' | '.join(f'{ratio:.1f}' for ratio in ratios)} |")
    sizes = next(iter(found.values()))
    table = "\n".join(lines)
    return f"""\
`python benchmarks/base_cache.py`: loading a random Llama of 1.1 B parameters in bf16
({sizes["original"] / GB:.2f} GB of files) to an NF4 base sharded by ZeRO-3 with adapters, and the
same from its cache ({sizes["cache"] / GB:.2f} GB); {os.cpu_count()} cores, one thread a rank, files
in the page cache, medians of {REPEATS}.

{table}"""


if __name__ == "__main__":
    main()
