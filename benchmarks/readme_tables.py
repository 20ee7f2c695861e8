"""Rewrites the block of README.md between its two marks from the figures in benchmarks/results.

python benchmarks/readme_tables.py [--print]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _job import RESULTS, ROOT, header
from _load_report import table as load_table

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def main() -> None:
    """Print the block, or put it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="leave README.md as it is")
    args = parser.parse_args()
    if args.print:
        print(block())
    else:
        readme = ROOT / "README.md"
        readme.write_text(replaced(readme.read_text(), block()))


def replaced(text: str, new: str) -> str:
    """``text`` with ``new`` between the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md has no {BEGIN} ... {END}: put both on lines of their own")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def block() -> str:
    """A section for each result that is there."""
    found = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    parts = [write(found[name]) for name, write in SECTIONS.items() if name in found]
    return "\n\n".join(parts)


def load(found: dict[str, Any]) -> str:
    """Of ``load.json``."""
    return f"""\
Loading a random Llama of 1.1 B parameters beside transformers + bitsandbytes + PEFT, peak memory of
the worst rank (`python benchmarks/load.py`, `benchmarks/results/load.md`):

{load_table(found)}"""


def step(found: dict[str, Any]) -> str:
    """Of ``step.json``."""
    lines = header("tokens/s, ours / usual", "training peak, usual", "ours", "gathered a step")
    for name, case in found.items():
        sizes = [case["usual"]["training"], case["ours"]["training"], case["ours"]["gathered"]]
        cells = [f"{case['tokens_per_s_ours_by_usual']['clock']:.2f}"]
        cells += [f"{size / 1e6:,.0f} MB" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""\
A step of plain LoRA beside the same, in turn in the same processes (`python benchmarks/step.py`,
`benchmarks/results/step.md`):

{table}"""


def rehearsal(found: dict[str, Any]) -> str:
    """Of ``rehearsal_70b.json``."""
    from _rehearsal_report import table

    return f"""\
One rank of N that loads a checkpoint of Llama-3-70B's shape, the others stood in for
(`python benchmarks/rehearsal_70b.py`, `benchmarks/results/rehearsal_70b.md`):

{table(found)}"""


SECTIONS = {"load": load, "step": step, "rehearsal_70b": rehearsal}


if __name__ == "__main__":
    main()
