"""Does each method find a planted structure, and do IncreLoRA's two scores choose alike?

    python benchmarks/toy_tasks.py

The tasks are those of ``tests/fixtures/toy_tasks.py``, over three seeds.

Shapes: S sites.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from _side_by_side import on_ranks  # isort: skip  # sets the path

import torch
from _job import write

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods import METHODS, Method
from sparse_lora_dist.methods.increlora import (
    IncreLoraOptions,
    component_scores,
    delta_scores,
    open_components,
    planned,
)
from sparse_lora_dist.methods.protocol.method import Decision, Scores
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others
from tests.fixtures.toy_tasks import (
    GROWN,
    Learned,
    Task,
    kept_in_one_of_four,
    learn,
    learned_rank_two,
    learned_rank_two_with_two,
    learned_sparse,
    low_rank,
    one_of_four_task,
)

SEEDS = (0, 1, 2)
SCORES = ("triplet", "delta")

RUNS: dict[str, tuple[str, Callable[[int], Learned]]] = {
    "roselora": ("200 nonzeros in 256 x 256", learned_sparse),
    "sora": ("rank 2 in 64 x 64, capacity 8", learned_rank_two),
    "lora, rank 2": ("the same", learned_rank_two_with_two),
    "adalora": ("rank 8 in the third of four, budget 48 to 8", kept_in_one_of_four),
}


def graded_task(seed: int) -> Task:
    """Rank 8 in each of eight linears of 48 x 48, each 0.7 times as large as the one before."""
    planted_SOI = torch.stack([0.7**s * low_rank(48, 8, 100 * seed + s) for s in range(8)])
    return Task(seed=seed, planted_SOI=planted_SOI, rank=12, steps=150, rate=1e-2)


GROWTHS: dict[str, tuple[Callable[[int], Task], dict[str, Any]]] = {
    "third of four": (one_of_four_task, GROWN),
    "graded": (graded_task, GROWN | {"increlora_modules": 2, "increlora_pieces": 1}),
}


@dataclass
class Comparison:
    """Both scores at every growth of a run in which one of them chose."""

    correlations: list[float] = field(default_factory=list)
    """Spearman's, over the linears."""
    same: list[bool] = field(default_factory=list)
    """Would both have opened the same components?"""

    def watching(self, task: Task, options: Mapping[str, Any]) -> Callable[[Method], Method]:
        """method -> the same one, with the statistics of both scores."""
        growth = planned(IncreLoraOptions(**options), task.plan)
        by = {
            s: METHODS["increlora"].build(
                IncreLoraOptions(**{**options, "increlora_score": s}), task.plan
            )
            for s in SCORES
        }

        def watched(method: Method) -> Method:
            def decide(step: int, scores: Scores) -> Decision:
                if step > 0:
                    open_S = open_components(growth, scores)
                    component_S, delta_S = (
                        component_scores(growth, scores, open_S),
                        delta_scores(scores),
                    )
                    self.correlations.append(spearman(component_S, delta_S))
                    self.same.append(
                        growth.grown(open_S, component_S) == growth.grown(open_S, delta_S)
                    )
                return method.decide(step, scores)

            return replace(
                method,
                n_stats=by["triplet"].n_stats,
                observe=by["triplet"].observe,
                probe=by["delta"].probe,
                n_site_stats=by["delta"].n_site_stats,
                observe_sites=by["delta"].observe_sites,
                decide=decide,
            )

        return watched


def spearman(x_S: Sequence[float], y_S: Sequence[float]) -> float:
    """Correlation of the places in order, without ties."""
    places = torch.tensor([x_S, y_S], dtype=torch.float64).argsort(dim=1).argsort(dim=1)
    return float(torch.corrcoef(places.double())[0, 1])


def grown(task_name: str, score: str) -> tuple[str, str]:
    """A row of what was learned by IncreLoRA, and one of how far the scores agree. Collective."""
    task_of, options = GROWTHS[task_name]
    options = options | {"increlora_score": score}
    seen, runs = Comparison(), []
    for task in map(task_of, SEEDS):
        runs.append(learn(task, "increlora", options, seen.watching(task, options)))
    low, high, count = min(seen.correlations), max(seen.correlations), len(seen.same)
    agreement = (
        f"| {task_name} | {score} | {count} | {mean(seen.correlations):.2f} ({low:.2f} to "
        f"{high:.2f}) | {sum(seen.same)} of {count} |"
    )
    return row(f"increlora, {score}", task_name, runs), agreement


def report() -> str:
    """The result file. Collective."""
    rows = [row(name, what, [run(s) for s in SEEDS]) for name, (what, run) in RUNS.items()]
    pairs = [grown(task_name, score) for task_name in GROWTHS for score in SCORES]
    learned = "\n".join(rows + [first for first, _ in pairs])
    agreement = "\n".join(second for _, second in pairs)
    return f"""\
`python benchmarks/toy_tasks.py`: y = (W + planted) x + noise of 0.05, 120 to 150 steps of 64 rows,
2 CPU ranks, ZeRO-3, fp32; options of `tests/fixtures/toy_tasks.py`. A number for each of 3 seeds.
Left: share of the held-out loss above noise that is still there. Zeros: of the entries of B A;
covered: planted entries that are not zero there.

| method | planted | left | open components | zeros | covered |
|---|---|---|---|---|---|
{learned}

Third of four: rank 8 in the third of four linears of 64 x 64, nothing in the others. Graded: rank 8
in each of eight linears of 48 x 48, each 0.7 times as large as the one before; 8+8+3+1+1+1+1+1
would be best there. Ranks grow from 1 to 3 on average.

Do the triplet and the delta score agree? Both taken at every growth of the IncreLoRA runs above, in
each of which one of them chose: Spearman's correlation over the linears, mean and range; growths at
which both would have opened the same components.

| task | chosen by | growths | correlation | same choice |
|---|---|---|---|---|
{agreement}"""


def row(name: str, planted: str, runs: Sequence[Learned]) -> str:
    """One method's, every seed in each cell."""
    left = ", ".join(f"{round(100 * run.left, 1) + 0.0}%" for run in runs)
    ranks = ", ".join("+".join(map(str, run.ranks)) for run in runs)
    if "roselora" not in name:
        return f"| {name} | {planted} | {left} | {ranks} | | |"
    zeros = ", ".join(f"{run.zeros:.4f}" for run in runs)
    covered = ", ".join(f"{100 * run.covered:.0f}%" for run in runs)
    return f"| {name} | {planted} | {left} | {ranks} | {zeros} | {covered} |"


def on_this_rank() -> None:
    """One rank's part; rank 0 writes."""
    quiet_others()
    comm.start()
    text = report()
    if comm.rank() == 0:
        write("toy_tasks.md", text)
    comm.barrier()
    exit_process(0)


if __name__ == "__main__":
    on_this_rank() if "RANK" in os.environ else on_ranks(__file__, ranks=2)
