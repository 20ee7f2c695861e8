"""Does this tree compute what another commit computed, to the bit?

    python -m tests.project.same_as_commit 71bf4ff [METHOD ...]

Runs 12 steps of every method with the options of ``tests/laws.py`` on 2 ranks, in a clone of the
commit and here, on one model and one data set. Compares adapters, checkpoints (but for random
states), decisions, stages, and metrics without those that measure time and memory. Ends with
status 1 where anything differs.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).parents[2]
MEASURED = ("tokens_per_s", "peak_memory_bytes")
LOGS = ("metrics.jsonl", "decisions.jsonl", "stages.jsonl")


def run_all(out: Path, methods: list[str]) -> None:
    """Train with every method of the tree in the current folder."""
    sys.path.insert(0, os.getcwd())
    tiny, work = _module("tests.fixtures.tiny_run", "tests.tiny_run"), "tests.work.run:train_toy"
    if not Path("tests/work").is_dir():  # before the tests were moved into folders
        work = "tests.run_work:train_toy"
    laws = import_module("tests.laws").LAWS
    folder = out.parent / "tiny"
    if not folder.exists():
        folder.mkdir()
        tiny.write_tiny_run(folder)
    data = tiny.TinyRun(
        model=folder / "model", data=folder / "train.jsonl", held_out=folder / "held_out.jsonl"
    )
    pool = import_module("tests.ranks").RankPool(2)
    for method in methods or [name for name in laws if name != "toy"]:
        usual = {"method": method, "max_steps": 12, "micro_batch_size": 6, "rank": 6}
        usual |= {"learning_rate": 2e-3, "max_grad_norm": 0, "save_every": 4, "eval_every": 6}
        pool.run(work, flags=data.flags(out / method, **usual | laws[method].on))
    pool.close()


def _module(*names: str) -> Any:
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(" or ".join(names))


def what_differs(one: Path, other: Path) -> list[str]:
    """Names of the files in which two runs of a method differ."""
    names = {
        str(path.relative_to(run))
        for run in (one, other)
        for path in run.rglob("*")
        if path.suffix == ".safetensors" or path.name in LOGS
    }
    return [name for name in sorted(names) if content(one / name) != content(other / name)]


def content(path: Path) -> Any:
    """What of a file is compared; None where there is no such file."""
    if not path.exists():
        return None
    if path.suffix != ".safetensors":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], raw[start + first : start + last])
        for name, entry in header.items()
        if not name.startswith("rng/")
        for first, last in [entry["data_offsets"]]
    }


def main(commit: str, methods: list[str]) -> int:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clone = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
        subprocess.run(["git", "-C", clone, "checkout", "--quiet", commit], check=True)
        for tree, name in ((clone, "then"), (REPOSITORY, "now")):
            command = [sys.executable, __file__, "--run", str(folder / name), *methods]
            environment = os.environ | {"PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu"}
            subprocess.run(command, cwd=tree, env=environment, check=True, stderr=subprocess.PIPE)
        found = {
            run.name: what_differs(run, folder / "now" / run.name)
            for run in sorted((folder / "then").iterdir())
        }
    for method, names in found.items():
        print(f"{method:<12}{'same bits' if not names else 'differs: ' + ', '.join(names)}")
    return int(any(found.values()))


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run_all(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
