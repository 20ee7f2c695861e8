"""Exact bytes of optimizer state and statistics of every method, beside those of dense AdamW.

python benchmarks/state_bytes.py
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _side_by_side import build, on_ranks, save_llama  # isort: skip  # sets the path

import torch
from _job import header, write
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.optim.sparse_adamw import CHUNK
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

RANKS = 2
MODEL = {"width": 1024, "inner": 2816, "layers": 9}

STATE_STEPS = 30
STATE_OPTIONS: dict[str, tuple[str, dict[str, Any], int]] = {
    "lora": ("lora", {}, 32),
    "roselora, keep 0.05": ("roselora", {}, 32),
    "roselora, keep 0.05, 8-bit moments": ("roselora", {}, 8),
    "sora": ("sora", {}, 32),
    "sora, gates stay shut": ("sora", {"sora_reopen": False}, 32),
    "increlora, ranks 1 to 8 on average": (
        "increlora",
        {"increlora_target_rank": 8.0},
        32,
    ),
    "adalora, ranks 16 to 8 on average": ("adalora", {"adalora_target_rank": 8.0}, 32),
}


def main() -> None:
    """Make the model, run the ranks, write the tables."""
    with tempfile.TemporaryDirectory() as folder:
        save_llama(folder, **MODEL)
        on_ranks(__file__, folder, ranks=RANKS)
        found = json.loads((Path(folder) / "found.json").read_text())
    write("state_bytes.md", report(found))


def on_this_rank(folder: str) -> None:
    """One rank's part; rank 0 leaves what was found beside the model."""
    quiet_others()
    comm.start()
    found = states(folder)
    if comm.rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def states(folder: str) -> dict[str, Any]:
    """Bytes of every method after a run to its end state, of each rank."""
    found = {}
    for label, (name, options, bits) in STATE_OPTIONS.items():
        run = build(name, options, folder=folder, steps=STATE_STEPS, tokens=32, bits=bits)
        statistics = run.shards.statistics_bytes()
        for step in range(1, STATE_STEPS + 1):
            run.step(step)
        state, flats = run.shards.optimizer.state_bytes(), run.engine.flats()
        own = {
            "entries": sum(flat.numel() for flat in flats),
            "live": run.shards.optimizer.num_live(),
            "now": state.now,
            "peak": state.peak,
            "repacking": state.repacking,
            "dense": dense_moments_bytes(flats),
            "statistics": statistics,
            "statistics at the end": run.shards.statistics_bytes(),
        }
        found[label] = comm.gather_objects(own)
    return found


def dense_moments_bytes(flats: list[Tensor]) -> int:
    """What torch.optim.AdamW holds for these shards, by its storages."""
    copies = [torch.nn.Parameter(flat.detach().clone()) for flat in flats]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies)
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return sum(t.untyped_storage().nbytes() for t in moments)


def report(found: Mapping[str, list[dict[str, int]]]) -> str:
    """The result file."""
    state, saves = "\n".join(state_table(found)), "\n".join(who_saves(found))
    return f"""\
`python benchmarks/state_bytes.py`: {RANKS} CPU ranks, ZeRO-3 as in `ds_configs/zero3.json`, rank 16
on all linears of a random Llama of {MODEL["layers"]} layers of width {MODEL["width"]},
{STATE_STEPS} steps to the method's end state.

Both ranks together, but for the last columns; exact, by storages. Dense AdamW: torch.optim.AdamW's
two fp32 moments for the same shards. Peak: between re-packings. Re-packing: besides, the new state
of a chunk of {CHUNK:,} entries and what is spread out of the old, on each rank at most
{CHUNK * (8 + 13) / 1e6:.1f} MB and births, however large the model. Entries born at different steps
cost 2 bytes more each. Over the bound: state at the end less 8 x live + all / 8, of the rank where
it is most.

{state}

{saves}"""


def state_table(found: Mapping[str, list[dict[str, int]]]) -> list[str]:
    """Markdown: bytes of both ranks together, and those of one."""
    lines = header(
        "entries",
        "live at the end",
        "dense AdamW",
        "at the end",
        "peak",
        "re-packing",
        "statistics, first",
        "last",
        "8 live + all / 8",
        "largest rank: dense",
        "at the end",
        "peak",
        "over the bound",
    )
    for label, ranks in found.items():
        total = {key: sum(own[key] for own in ranks) for key in ranks[0]}
        most = {key: max(own[key] for own in ranks) for key in ranks[0]}
        keys = ("entries", "live", "dense", "now", "peak", "repacking")
        cells = [total[key] for key in (*keys, "statistics", "statistics at the end")]
        cells += [8 * total["live"] + total["entries"] // 8]
        cells += [most[key] for key in ("dense", "now", "peak")]
        cells.append(max(own["now"] - 8 * own["live"] - -(-own["entries"] // 8) for own in ranks))
        lines.append(f"| {label} | " + " | ".join(f"{n:,}" for n in cells) + " |")
    return lines


def who_saves(found: Mapping[str, list[dict[str, int]]]) -> list[str]:
    """In words, from the numbers."""
    lines = []
    for what, extra in {"Moments alone": 0, "Moments and statistics": 1}.items():
        saves: dict[str, list[str]] = {
            "less at the peak too": [],
            "only later": [],
            "never": [],
        }
        for label, ranks in found.items():
            total = {key: sum(own[key] for own in ranks) for key in ranks[0]}
            peak = total["peak"] + extra * total["statistics"]
            end = total["now"] + extra * total["statistics at the end"]
            when = list(saves)[(peak >= total["dense"]) + (end >= total["dense"])]
            saves[when].append(label)
        said = [f"{when}: {'; '.join(labels) or 'none'}" for when, labels in saves.items()]
        lines.append(f"- {what}, against the dense moments. " + ". ".join(said) + ".")
    return lines


if __name__ == "__main__":
    on_this_rank(sys.argv[1]) if sys.argv[1:] else main()
