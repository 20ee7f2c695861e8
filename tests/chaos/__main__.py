"""Kill a run again and again, at moments drawn by a seed: python -m tests.chaos [--kills 100]."""

import argparse
import os
import random
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from sparse_lora_dist.distributed.console import print_line
from tests.chaos import harness, moments
from tests.fixtures.tiny_run import TinyRun, write_tiny_run

KILLS_OF_A_RUN = 10


def main() -> None:
    """Runs until so many kills came; a table by moment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    numbers = random.Random(arguments.seed)
    kills: Counter[str] = Counter()
    lost: dict[str, list[int]] = defaultdict(list)
    runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = write_tiny_run(folder)
        reference = folder / "undisturbed"
        with harness.fresh_ranks() as pool:
            calls: list[dict[str, int]] = pool.run(
                "tests.chaos.moments:calls_of_each", flags=harness.flags_of(tiny, reference)
            )
        while kills.total() < arguments.kills:
            story = one_run(tiny, folder / f"run_{runs}", reference, numbers, calls)
            runs += 1
            for plan, steps in zip(story.kills, story.lost_steps, strict=True):
                kills[plan["moment"]] += 1
                lost[plan["moment"]].append(steps)
            print_line("run", f"{runs}: {len(story.kills)} kills, same end; {kills.total()} so far")
    print(table(kills, lost, runs))


def one_run(
    tiny: TinyRun,
    run: Path,
    reference: Path,
    numbers: random.Random,
    calls: list[dict[str, int]],
) -> harness.Story:
    """Killed a few times, then let come to its end, which is checked."""
    story, flags = harness.Story(), harness.flags_of(tiny, run)
    ended = False
    for _ in range(KILLS_OF_A_RUN):
        left = 1 - harness.newest(run) / harness.STEPS
        plan: dict[str, Any] = moments.drawn(numbers, calls, left)
        ended = ended or harness.killed(flags, run, plan, story)
    assert ended or harness.attempt(flags, None)
    harness.check_end(run, reference)
    return story


def table(kills: Counter[str], lost: dict[str, list[int]], runs: int) -> str:
    """Markdown, for docs/."""
    lines = [
        f"{kills.total()} kills in {runs} runs of {harness.STEPS} steps, a checkpoint every "
        f"{harness.EVERY}; every run came to the end of the undisturbed one, bit for bit.",
        "",
        "| killed at | times | most steps made again |",
        "|---|---:|---:|",
    ]
    lines += [f"| {moment} | {kills[moment]} | {max(lost[moment])} |" for moment in sorted(kills)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
    os._exit(0)  # not through gloo's threads
