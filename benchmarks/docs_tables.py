"""Write a page of docs/results for each result in benchmarks/results.

python benchmarks/docs_tables.py [--check]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _job import RESULTS, ROOT

PAGES = ROOT / "docs" / "results"
TITLES = {
    "base_alive": "Base weights alive between forward and backward",
    "base_cache": "Loading from the base cache",
    "cola": "CoLA with a random encoder",
    "edit_files": "Files of edits",
    "exporting": "Memory and time of an export",
    "family": "All seventeen methods side by side",
    "knowledge_edit": "Editing facts",
    "load": "Loading: memory and time",
    "load_bytes": "Loading: bytes read and received",
    "methods": "Five methods, 60 steps",
    "peft_adalora": "AdaLoRA under ZeRO-3: PEFT and this project",
    "plan_check": "Planned memory against measured memory",
    "real_data": "Public data sets",
    "rehearsal_70b": "Loading Llama-3-70B's shape, rehearsed",
    "saving": "Writing and reading checkpoints",
    "seeds": "The embedded run, three seeds",
    "state_bytes": "Bytes of the optimizer state",
    "step": "A training step beside PEFT's",
    "step_time": "Step time of sparse methods",
    "study": "Quality against cost, five methods",
    "toy_tasks": "Planted structure that is found again",
    "waits": "Waits and launches of a step",
}
PICTURES = ("family", "load", "rehearsal_70b", "step", "study")
"""Results with a plot; its copy lies beside the page."""


def main() -> None:
    """Write the pages, or say which ones are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one differs")
    args = parser.parse_args()
    stale = [path for path, content in pages().items() if not is_equal(path, content)]
    if args.check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(f"out of date: {names}. Run python benchmarks/docs_tables.py")
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pages()[path])


def pages() -> dict[Path, bytes]:
    """The pages and pictures that docs/results must have, with their content."""
    found = {}
    for name, title in TITLES.items():
        result = RESULTS / f"{name}.md"
        if result.exists():
            found[PAGES / result.name] = page(name, title, result.read_text()).encode()
    for name in PICTURES:
        picture = RESULTS / f"{name}.png"
        if picture.exists():
            found[PAGES / picture.name] = picture.read_bytes()
    return found


def page(name: str, title: str, text: str) -> str:
    """A result as a page: under one title, with its plot."""
    lines = text.strip().splitlines()
    if lines[0].startswith("# "):
        lines = lines[1:]
    picture = f"\n![Plot: {title}]({name}.png)\n" if name in PICTURES else ""
    body = "\n".join(lines).strip()
    source = f"<!-- Written by benchmarks/docs_tables.py from benchmarks/results/{name}.md. -->"
    return f"# {title}\n\n{source}\n\n{body}\n{picture}"


def is_equal(path: Path, content: bytes) -> bool:
    """Does the file have this content?"""
    return path.exists() and path.read_bytes() == content


if __name__ == "__main__":
    main()
