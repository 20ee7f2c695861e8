"""Time of a step of each sparse method relative to plain LoRA.

    python benchmarks/step_time.py [--rounds 30]

Only ratios are reported. The engines are in the same two processes and step in turn, so that other
load on the machine affects all of them.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from _side_by_side import on_ranks, save_llama  # isort: skip  # sets the path

from _job import header, write
from _step_time import (
    EVERY,
    PARTS,
    RANK,
    TIMED,
    TOKENS,
    WARM_UP,
    delta_ratios,
    times,
)

from sparse_lora_dist.config.sections import TrainConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others
from sparse_lora_dist.sparsity.decisions import MODULES

TINY = {"width": 256, "inner": 704, "layers": 4}
RANKS, ROWS = 2, TrainConfig().micro_batch_size
PHASES = {"default batch": partial(times, rows=ROWS), "small batch": partial(times, rows=1)}
COMMAND = "`python benchmarks/step_time.py`"


def main() -> None:
    """Make the models, run the ranks, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="measured ones, in tens")
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing is written")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        on_this_rank(args.phase, args.folder, args.rounds)
    found = {}
    for phase in PHASES:
        with tempfile.TemporaryDirectory() as folder:
            save_llama(folder, **(TINY if args.tiny else TIMED))
            arguments = [
                "--phase",
                phase,
                "--folder",
                folder,
                "--rounds",
                str(args.rounds),
            ]
            on_ranks(__file__, *arguments, ranks=RANKS)
            found[phase] = json.loads((Path(folder) / "found.json").read_text())
    text = report(found, args.rounds)
    print(text) if args.tiny else write("step_time.md", text)


def on_this_rank(phase: str, folder: str, rounds: int) -> None:
    """One rank's part; rank 0 leaves what was found beside the model."""
    quiet_others()
    comm.start()
    found = PHASES[phase](folder, rounds)
    if comm.rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def report(found: dict[str, dict[str, Any]], rounds: int) -> str:
    """The result file."""
    default, small = found.values()
    gathered = default.pop("gathered")
    small.pop("gathered")
    width, inner, layers = TIMED.values()
    return f"""\
{COMMAND}: {RANKS} CPU ranks of one thread, ZeRO-3 as in `ds_configs/zero3.json`, NF4, bf16, rank
{RANK} on all linears of random Llamas.

{layers} layers of width {width} and {inner}, {linear_weights() / 1e6:.0f} M weights in the linears.
One engine a method in the same two processes, stepped in turn, in an order drawn anew each round; a
time is divided by LoRA's in the same round. {WARM_UP} rounds to warm up, {rounds} measured, a
decision in every {EVERY}th. Medians over rounds; amortised: the {EVERY}th part of one with a
decision and the rest without; mean of all: as it says, outliers in it. Processor: seconds that the
ranks computed, without waiting for the other or for other programs. The second LoRA engine shows
what the machine's noise makes of no difference. The target is +3% amortised.

{ROWS} rows of {TOKENS} tokens a rank, the default batch:

{table(time_table(default))}

One row of {TOKENS} tokens a rank:

{table(time_table(small))}

Bytes received are those of statistics and scores, by one rank. After a decision the agreement check
gathers the adapters besides, {MODULES} modules at a time: {gathered:,} bytes.

Parts of decision steps with one row, in LoRA steps of the same round, waiting for the other rank
included: confirm is the agreement check, and decide contains the check that what rests has not
moved.

{table(parts_table(small))}

A delta kept in factors, against the released IncreLoRA's, which multiplies B diag(lambda) A out to
O x I in each forward: time of its forward and backward in those of ours, {RANK} components,
{TOKENS} tokens, one thread, bf16, paired, median.

{table(delta_table())}"""


def table(lines: list[str]) -> str:
    """Its lines as text."""
    return "\n".join(lines)


def linear_weights() -> int:
    """Of the timed model: four heads of eight share keys and values."""
    width, inner, layers = TIMED.values()
    return layers * (3 * width * width + 3 * width * inner)


def time_table(measured: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """Markdown: every method beside the LoRA step of the same round."""
    lines = header(
        "without a decision",
        "with one",
        "amortised",
        "mean of all",
        "processor: without",
        "with",
        "amortised",
        "bytes received",
    )
    for name, rounds in measured.items():
        cells = []
        for what in ("step", "cpu"):
            pairs = zip(rounds, measured["lora"], strict=True)
            ratios = [(r["decides"], r[what] / base[what]) for r, base in pairs]
            plain = median(q for decides, q in ratios if not decides)
            deciding = median(q for decides, q in ratios if decides)
            cells += [plain, deciding, ((EVERY - 1) * plain + deciding) / EVERY]
            if what == "step":
                cells.append(mean(q for _, q in ratios))
        received = max(r["bytes"] for r in rounds)
        lines.append(f"| {name} | {' | '.join(map(percent, cells))} | {received:,.0f} |")
    return lines


def percent(ratio: float) -> str:
    """How much above 1."""
    return f"{100 * (ratio - 1):+.1f}%"


def parts_table(measured: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """Markdown: parts of a step, of the LoRA step of the same round."""
    lines = header(*PARTS, "optimizer, other rounds")
    lora = [r["step"] for r in measured["lora"]]
    for name, rounds in measured.items():
        pairs = list(zip(rounds, lora, strict=True))
        cells = [median(r[part] / base for r, base in pairs if r["decides"]) for part in PARTS]
        cells.append(median(r["optimizer"] / base for r, base in pairs if not r["decides"]))
        lines.append(f"| {name} | " + " | ".join(f"{100 * cell:.2f}%" for cell in cells) + " |")
    return lines


def delta_table() -> list[str]:
    """Markdown."""
    lines = header("delta alone", "with the frozen linear", first="O x I")
    for (num_out, num_in), (alone, whole) in delta_ratios().items():
        lines.append(f"| {num_out} x {num_in} | {alone:.1f} | {whole:.2f} |")
    return lines


if __name__ == "__main__":
    main()
