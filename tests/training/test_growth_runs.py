"""IncreLoRA in a real run: what moves between two growths, at one, and at the last."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.work.growth import Watched, whole_masters

WATCH = "tests.work.growth:watch"
RANK, STEPS, RESERVE_LAMBDA = 4, 14, 1e-5
GROWTHS = [4, 8, 12]
BUDGET = 14 + 2 * 14 + 5


class Growth(NamedTuple):
    """A run that opens two components in each of seven linears at steps 4 and 8, the rest at 12."""

    said: str
    masters: list[dict[str, Tensor]]
    """Before the first step and after each."""
    ranks: list[dict[str, int]]
    """Open components of every site, the same."""


@pytest.fixture(scope="module")
def growth(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Growth:
    folder = tmp_path_factory.mktemp("growth")
    # Without the penalty it is the loss alone that moves what moves.
    options: dict[str, Any] = {
        "method": "increlora",
        "max_steps": STEPS,
        "rank": RANK,
        "increlora_every": 4,
        "increlora_modules": 7,
        "increlora_pieces": 2,
        "increlora_budget": BUDGET,
        "increlora_orthogonality": 0.0,
        "learning_rate": 1e-2,
    }
    everyone: list[Watched] = ranks(2, WATCH, flags=tiny.flags(folder, **options))
    rows = {row["step"]: row["ranks"] for row in read_records(folder / "decisions.jsonl")}
    assert list(rows) == GROWTHS
    now = dict.fromkeys(rows[GROWTHS[0]], 1)
    open_at = [now := rows.get(step, now) for step in range(STEPS + 1)]
    return Growth(said=everyone[0].said, masters=whole_masters(everyone), ranks=open_at)


def moved(run: Growth, name: str, since: int, until: int) -> Tensor:
    """Which components of a tensor differ between the ends of two steps."""
    differ = run.masters[since][name] != run.masters[until][name]
    components_first = differ.t() if name.endswith("lora_b") else differ.view(RANK, -1)
    return components_first.any(1)


def test_between_two_growths_the_reserve_learns_in_advance_and_nothing_beyond_it_moves(
    growth: Growth,
) -> None:
    reserves = 0
    for since, until in zip([0, *GROWTHS[:-1]], [step - 1 for step in GROWTHS], strict=True):
        for site, num_open in growth.ranks[since].items():
            for name in (f"{site}.lora_a", f"{site}.lora_b"):
                # At the capacity there is no reserve, and both are empty.
                assert moved(growth, name, since, until)[num_open : num_open + 1].all()
                assert not moved(growth, name, 0, until)[num_open + 1 :].any()
            for step in range(since, until + 1):
                lambda_R = growth.masters[step][f"{site}.lora_lambda"]
                assert (lambda_R[num_open:] == RESERVE_LAMBDA).all()
            reserves += num_open < RANK
    assert reserves > 2 * 14


def test_once_a_growth_has_opened_it_a_components_lambda_moves(growth: Growth) -> None:
    opened = 0
    for step in GROWTHS:
        for site, num_open in growth.ranks[step].items():
            before, name = growth.ranks[step - 1][site], f"{site}.lora_lambda"
            # The reserve's at once; what lay beyond it is computed from the next step on.
            assert moved(growth, name, step - 1, step)[before:num_open][:1].all()
            assert moved(growth, name, step - 1, step + 1)[:num_open].all()
            opened += num_open - before
    assert opened == BUDGET - 14


def test_at_the_budget_every_lambda_that_is_not_open_is_exactly_zero_and_stays(
    growth: Growth,
) -> None:
    closed = 0
    for site, num_open in growth.ranks[-1].items():
        before = growth.masters[GROWTHS[-1] - 1][f"{site}.lora_lambda"]
        assert (before[growth.ranks[GROWTHS[-1] - 1][site] :] == RESERVE_LAMBDA).all()
        for step in range(GROWTHS[-1], STEPS + 1):
            lambda_R = growth.masters[step][f"{site}.lora_lambda"]
            assert (lambda_R[num_open:] == 0.0).all() and (lambda_R[:num_open] != 0.0).all()
        closed += RANK - num_open
    assert closed == 14 * RANK - BUDGET


def test_the_released_preset_says_at_the_start_by_how_much_it_overshoots(
    growth: Growth, ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    options = {"increlora_budget": 20, "increlora_modules": 4, "increlora_pieces": 2}
    words = tiny.flags(tmp_path, method="increlora", increlora_preset="released", **options)
    said, silent = ranks(2, "tests.work.run:train", flags=words)
    lines = [line for line in said.splitlines() if line.startswith("note ")]
    assert len(lines) == 1 and not silent
    assert (
        "released" in lines[0]
        and "ends at 22 components in all, above the budget of 20" in lines[0]
    )
    assert said.index(lines[0]) < said.index("held-out")
    assert sum(read_records(tmp_path / "decisions.jsonl")[-1]["ranks"].values()) == 22
    assert "\nnote " not in growth.said
