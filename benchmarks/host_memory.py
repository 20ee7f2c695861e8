"""What a rank on a CPU holds before it loads the base, and the peak of a run against its plan.

    python benchmarks/host_memory.py

Twelve steps of the embedded model on 1 and on 2 ranks, with glibc as it is. Prints a table.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _side_by_side import ROOT, on_ranks  # isort: skip  # sets the path

from _resident import peak_bytes, resident_bytes

STEPS = 12


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        on_this_rank(Path(args.folder))
        return
    print("| ranks | a rank before loading | peak, all ranks | planned | planned / peak - 1 |")
    print("|---:|---:|---:|---:|---:|")
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            on_ranks(__file__, "--folder", folder, ranks=ranks)
            found = [json.loads(path.read_text()) for path in Path(folder).glob("rank_*.json")]
        peak, plan = sum(one["peak"] for one in found), found[0]["planned"]
        before = max(one["before"] for one in found) / 1e9
        sizes = f"{before:.2f} GB | {peak / 1e9:.2f} GB | {plan / 1e9:.2f} GB"
        print(f"| {ranks} | {sizes} | {plan / peak - 1:+.1%} |", flush=True)


def on_this_rank(folder: Path) -> None:
    """The main job; this rank leaves what it held."""
    from sparse_lora_dist import train as program
    from sparse_lora_dist.config.load import load_config
    from sparse_lora_dist.distributed import comm
    from sparse_lora_dist.plan.advice import need_of
    from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks
    from sparse_lora_dist.plan.shapes import shapes_of
    from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

    quiet_others()
    words = ["--ds_config", str(ROOT / "ds_configs" / "zero3.json"), "--trackers", "[]"]
    config = load_config([*words, "--max_steps", str(STEPS), "--output_dir", f"{folder}/run"])
    found: dict[str, int] = {}
    usual = program.say_whether_it_fits

    def measure_first(*arguments: Any) -> None:
        found["before"] = resident_bytes()
        usual(*arguments)

    with patch.object(program, "say_whether_it_fits", measure_first):
        program.run(config)
    found["peak"] = peak_bytes()
    engine = PlannedEngine.of(json.loads(Path(config.run.ds_config).read_text()))
    ranks = Ranks(world_size=comm.world_size(), on_gpu=False)
    found["planned"] = need_of(shapes_of(config), engine, ranks).host
    (folder / f"rank_{comm.rank()}.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


if __name__ == "__main__":
    main()
