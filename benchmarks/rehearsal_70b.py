"""Loads and trains a model of Llama-3-70B's shape without its weights, and without its GPUs.

    python benchmarks/rehearsal_70b.py [--ranks 8 16 64]     load one rank's shard on a CPU;
                                                             rows of other sizes are kept
    python benchmarks/rehearsal_70b.py --train               load and train on this machine's GPUs

The first form writes sparse base files of the model's shape (``_sparse_checkpoint``) and starts the
first and the last rank of a job of that size, each alone (``_one_of_many`` simulates the others).
The real loader reads and quantises that rank's shard. One tensor of each shape holds random numbers
and is checked against bitsandbytes. The second form is ``_rehearsal_train``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _one_of_many import pretend, true_scales  # isort: skip  # sets the path

import bitsandbytes.functional as bnb
import torch
from _job import RESULTS, stored, write
from _rehearsal_plan import planned
from _rehearsal_report import plot, report
from _resident import forget_peak, peak_bytes
from _sparse_checkpoint import save
from torch import Tensor
from transformers import LlamaConfig

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.nf4_shard import own_bytes, own_weights, quantized_parameters
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import ModelConfig
from sparse_lora_dist.methods.protocol.method import Method
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.slices import own_range

LLAMA_3_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
ZERO3 = str(Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json")

Found = dict[str, Any]


def main() -> None:
    """Every size, first and last rank; figures, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--layers", type=int, help="so many; nothing is written then")
    parser.add_argument("--hidden", type=int, help="width, a multiple of 128; nor with this")
    parser.add_argument("--train", action="store_true", help="on the GPUs, or CPUs, that are here")
    parser.add_argument("--tokens", type=int, help="of a row, instead of 2048 and 4096")
    parser.add_argument("--cpu_ranks", type=int, default=1, help="where there is no GPU")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        from _rehearsal_train import train

        train(args.folder, json.loads(args.case))
    elif args.rank is not None:
        one_rank(args.folder, args.rank, args.ranks[0])
    else:
        with tempfile.TemporaryDirectory() as folder:
            filled = save(Path(folder), LlamaConfig(**shape_of(args.layers, args.hidden)))
            (Path(folder) / "filled.json").write_text(json.dumps(filled))
            rehearse(folder, args)


def rehearse(folder: str, args: argparse.Namespace) -> None:
    """On ranks of one or the other kind; a shape that was asked for leaves no results."""
    is_llama = not (args.layers or args.hidden)
    if args.train:
        from _rehearsal_train import train_all

        ranks = torch.cuda.device_count() or args.cpu_ranks
        train_all(folder, __file__, keep=is_llama, ranks=ranks, tokens=args.tokens)
        return
    found = [
        load_alone(folder, rank, ranks) for ranks in args.ranks for rank in sorted({0, ranks - 1})
    ]
    if is_llama:
        earlier = stored("rehearsal_70b.json") or []
        found += [f for f in earlier if f["ranks"] not in args.ranks]
        found.sort(key=lambda f: (f["ranks"], f["rank"]))
        (RESULTS / "rehearsal_70b.json").write_text(json.dumps(found, indent=1) + "\n")
        write("rehearsal_70b.md", report(found))
        plot(found, RESULTS / "rehearsal_70b.png")
    else:
        print(report(found))


def shape_of(layers: int | None, hidden: int | None) -> dict[str, Any]:
    """Llama-3-70B's, or a smaller one of the same proportions."""
    shape = LLAMA_3_70B | ({"num_hidden_layers": layers} if layers else {})
    if hidden:
        heads = max(hidden // 128, 1)
        shape |= {"hidden_size": hidden, "intermediate_size": hidden * 7 // 2}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": max(heads // 8, 1)}
        shape["vocab_size"] = 16 * hidden
    return shape


def load_alone(folder: str, rank: int, ranks: int) -> Found:
    """What ``one_rank`` found, in a process of its own."""
    command = [sys.executable, __file__, "--folder", folder, "--rank", str(rank)]
    subprocess.run([*command, "--ranks", str(ranks)], check=True)
    found: Found = json.loads((Path(folder) / "found.json").read_text())
    print(json.dumps(found), flush=True)
    return found


def one_rank(folder: str, rank: int, ranks: int) -> None:
    """Load as rank ``rank`` of ``ranks``, check, leave the figures beside the model."""
    from transformers.models.llama import modeling_llama

    del modeling_llama  # imported before memory is counted
    quiet_others()
    pretend(rank, ranks)
    config = Config(model=ModelConfig(model=folder))
    engine_config = engine_dict(ZERO3, config, ranks)
    method = Method(name="lora")
    before, started, busy = forget_peak(), time.perf_counter(), Clock()
    with busy.timing(nf4, "quantize", "scale_bytes"):
        model = Model.open(config)
        model.load(config, method, engine_config)
    seconds, peak = time.perf_counter() - started, peak_bytes() - before
    planned_shard, planned_peak = planned(config, ZERO3, ranks)
    held: Any = list(model.module.parameters())
    filled = json.loads((Path(folder) / "filled.json").read_text())
    found = {
        "ranks": ranks,
        "rank": rank,
        "bytes_read": model.files.bytes_read,
        "seconds": seconds,
        "quantise_s": busy.seconds,
        "peak": peak,
        "shard": sum(p.ds_tensor.nbytes for p in held if not p.requires_grad),
        "adapter": sum(p.ds_tensor.nbytes for p in held if p.requires_grad),
        "packed_sum": packed_sum(model),
        "checked": check(model, engine_config, filled),
        "planned_shard": planned_shard,
        "planned_peak": planned_peak,
    }
    (Path(folder) / "found.json").write_text(json.dumps(found))
    exit_process(0)


class Clock:
    """Seconds in functions of a module."""

    seconds = 0.0

    def timing(self, module: Any, *names: str) -> Any:
        """A context inside which they count."""
        return patch.multiple(
            module, **{name: self._timed(getattr(module, name)) for name in names}
        )

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def packed_sum(model: Model) -> int:
    """A sum over the bytes of the frozen parameters that need nothing from other ranks."""
    own: Any = {n: p for n, p in model.module.named_parameters() if not p.requires_grad}
    known = [p.ds_tensor.view(torch.uint8) for n, p in own.items() if not n.endswith(".scales")]
    return sum(int(t.sum(dtype=torch.int64)) for t in known)


def check(model: Model, engine_config: dict[str, Any], filled: list[str]) -> dict[str, str]:
    """Every tensor of ``filled`` -> what it is part of, bit for bit; raises where it is not."""
    builder = ShardBuilder(engine_config, torch.bfloat16)
    modules = dict(model.module.named_modules())
    said = {}
    for name in filled:
        source: Any = model.sources[name]
        numel = source.nbytes // source.dtype.itemsize
        linear, _, leaf = name.rpartition(".")
        layer = modules[linear]
        layer = getattr(layer, "base", layer)
        if hasattr(layer, "layout"):
            whole_N = model.files.read(source, 0, numel)
            assert check_linear(whole_N, layer, builder), name
            said[name] = "`bitsandbytes.functional.quantize_4bit` of the whole"
        else:
            start, stop = own_range(numel)
            own = model.files.read(source, start, stop)
            held = getattr(layer, leaf).ds_tensor
            assert torch.equal(held[: own.numel()], own) and own.any(), name
            said[name] = "the file"
    return said


def check_linear(whole_N: Tensor, layer: Any, builder: ShardBuilder) -> bool:
    """Loaded packed bytes, and packed bytes and scales of the same code where the stand-in brings
    the other ranks' true scales, against bitsandbytes' of the whole weight."""
    layout, dtype = layer.layout, builder.dtype
    theirs, state = bnb.quantize_4bit(
        whole_N.view(layout.shape), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    numbers = [state.state2.absmax, state.offset.reshape(1), state.absmax]
    their_scales = torch.cat([t.contiguous().view(torch.uint8) for t in numbers])
    start, stop = own_weights(layout, dtype)
    with true_scales(whole_N, layout, dtype):
        made = quantized_parameters(whole_N[start:stop].clone(), layout, builder)

    def same(parameter: Any, all_bytes: Tensor) -> bool:
        first, last = own_bytes(all_bytes.numel(), dtype)
        own = parameter.ds_tensor.view(torch.uint8)[: last - first]
        return torch.equal(own, all_bytes[first:last])

    packed, scales = made
    loaded: Any = layer.weight
    return all(
        [same(loaded, theirs.flatten()), same(packed, theirs.flatten()), same(scales, their_scales)]
    )


if __name__ == "__main__":
    main()
