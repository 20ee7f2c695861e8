"""Bytes that each rank reads and receives while it loads an NF4 base, on 1 to 4 ranks.

    python benchmarks/load_bytes.py [--model FOLDER]

Without a folder it loads a random Llama of 8 layers of odd widths, whose shards rarely end at a
quantisation block. The last column is counted by the operating system (``rchar`` of /proc/self/io),
not by this project.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

RESULT = Path(__file__).parent / "results" / "load_bytes.md"
SIZES = (1, 2, 3, 4)
Seen = dict[str, int]


def main() -> None:
    """Load on every number of ranks, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--seen", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seen:
        load(args.model, Path(args.seen))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or save_model(folder)
        found = {size: run(model, size, Path(folder)) for size in SIZES}
    text = table(found, args.model)
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text + "\n")


def load(folder: str, seen: Path) -> None:
    """One rank: load, and write down what it cost."""
    from sparse_lora_dist.base_model import shard_loader
    from sparse_lora_dist.base_model.shard_loader import ShardLoader
    from sparse_lora_dist.config.config import Config
    from sparse_lora_dist.config.deepspeed_file import engine_dict
    from sparse_lora_dist.config.sections import ModelConfig
    from sparse_lora_dist.distributed import comm
    from sparse_lora_dist.methods.protocol.method import Method
    from sparse_lora_dist.model.model import Model
    from sparse_lora_dist.runtime.entry_point import quiet_others

    quiet_others()
    comm.start()
    config = Config(model=ModelConfig(model=folder))
    engine_config = engine_dict({"zero_optimization": {"stage": 3}}, config, comm.world_size())
    usual = ShardLoader.load

    def counted(loader: ShardLoader, *args: object, **rest: object) -> None:
        before = read_by_system()
        usual(loader, *args, **rest)  # type: ignore[arg-type]
        report = loader.report
        costs: Seen = {
            "in_files": report.linear_bytes_in_file,
            "linears": report.linear_bytes_read,
            "others": report.other_bytes_read,
            "received": report.bytes_received,
            "system": read_by_system() - before,
        }
        (seen / f"{comm.rank()}.json").write_text(json.dumps(costs))

    quiet = patch.object(shard_loader, "with_progress", lambda jobs, name: jobs)
    with patch.object(ShardLoader, "load", counted), quiet:
        model = Model.open(config)
        model.load(config, Method(name="lora"), engine_config)


def read_by_system() -> int:
    """Bytes that this process has read so far; 0 where there is no /proc."""
    file = Path("/proc/self/io")
    if not file.exists():
        return 0
    return int(file.read_text().split()[1])


def save_model(folder: str) -> str:
    """Widths that are no multiples of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=500,
        intermediate_size=1331,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=5,
        vocab_size=8001,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def run(model: str, size: int, folder: Path) -> list[Seen]:
    """What each of ``size`` ranks saw."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    seen = folder / f"seen{size}"
    seen.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [
        *launcher,
        f"--nproc_per_node={size}",
        __file__,
        "--model",
        model,
        "--seen",
        str(seen),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads((seen / f"{rank}.json").read_text()) for rank in range(size)]


def table(found: dict[int, list[Seen]], model: str | None) -> str:
    """Markdown; of each kind, the rank that has most."""
    name = Path(model).name if model else "Llama, 8 layers of width 500, bf16 files"
    lines = [
        "# Bytes that a rank reads and receives while loading",
        "",
        f"{name}, NF4 with double quantisation; of each column, the rank that has most.",
        "`python benchmarks/load_bytes.py`" + (" --model ..." if model else ""),
        "",
        "| ranks | linears in the files | / ranks | linears read | embeddings, head, norms read "
        "| received (scales) | all reads, by the system |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, ranks in found.items():
        most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        fair = most["in_files"] // size
        keys = ("linears", "others", "received", "system")
        numbers = [size, most["in_files"], fair, *(most[key] for key in keys)]
        lines.append("| " + " | ".join(f"{n:,}" for n in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
