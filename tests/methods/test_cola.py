"""COLA: folding leaves the delta, a bounded stack keeps the nearest of its rank, every link starts
anew.

Shapes: I in_features, O out_features, R rank, Q rank of the stack.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.cola import ColaOptions, cola, nearest
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Method, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Whole
from sparse_lora_dist.report.run_data import read_run
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.training.test_laws import saved

SITE = Site(name="q", in_features=20, out_features=14, rank=3)
PLAN = RunContext(total_steps=20, warmup_steps=0, learning_rate=1e-3, sites=(SITE,))
SCALE = 0.5


def built(links: int, stack_rank: int | None = None, context: RunContext = PLAN) -> Method:
    return cola(ColaOptions(cola_links=links, cola_stack_rank=stack_rank), context)


def change(method: Method, tensors: dict[str, Tensor]) -> Tensor:
    """What is added to the weight, by the delta of the identity."""
    form = method.form(SITE)
    return form.delta(torch.eye(SITE.in_features), tensors, SCALE).t()


def chain(
    method: Method, links: int, first: dict[str, Tensor] | None = None
) -> list[tuple[Tensor, dict[str, Tensor], float]]:
    """Of every link: the delta at its end, the tensors after its fold, the fold's error; pairs are
    random, and nothing follows the last."""
    form, ended = method.form(SITE), []
    tensors = first or {k: torch.zeros(spec.shape) for k, spec in form.kept.items()}
    assert method.rewriting is not None
    for link in range(links):
        generator = torch.Generator().manual_seed(link)
        pair = {k: torch.randn(s.shape, generator=generator) for k, s in form.tensors.items()}
        tensors = tensors | pair
        before_OI, error = change(method, tensors), 0.0
        if link < links - 1:
            whole = Whole(
                site=SITE,
                index=0,
                step=method.stages[link],
                tensors=tensors,
                scale=SCALE,
                weight_OI=lambda: torch.zeros(0),
                generator=torch.Generator().manual_seed(100 + link),
            )
            done = method.rewriting.write(whole)
            tensors, error = dict(done.tensors), done.log_values["fold_error"]
        ended.append((before_OI, tensors, error))
    return ended


def naive(num_pairs: int) -> Tensor:
    """The sum of the pairs of ``chain``, each as the dense matrix that the paper merges."""
    total_OI = torch.zeros(SITE.out_features, SITE.in_features)
    for link in range(num_pairs):
        generator = torch.Generator().manual_seed(link)
        a_RI = torch.randn(3, SITE.in_features, generator=generator)
        total_OI += SCALE * torch.randn(SITE.out_features, 3, generator=generator) @ a_RI
    return total_OI


def test_the_update_is_the_sum_of_all_pairs_and_of_no_higher_rank() -> None:
    method = built(4)
    for link, (before_OI, tensors, error) in enumerate(chain(method, 4)):
        torch.testing.assert_close(before_OI, naive(link + 1))
        assert torch.linalg.matrix_rank(before_OI) == 3 * (link + 1)
        assert error == 0.0
        if link < 3:
            torch.testing.assert_close(change(method, tensors), before_OI)


def test_a_schedule_that_begins_anew_folds_onto_the_stack_that_is_there() -> None:
    method = built(4)
    (_, tensors, _), *_ = chain(method, 2)
    before_OI, after, _ = chain(method, 2, tensors)[0]
    torch.testing.assert_close(before_OI, naive(1) + naive(1))
    torch.testing.assert_close(change(method, after), before_OI)


def test_a_new_pair_is_drawn_as_loras_and_differs_from_link_to_link() -> None:
    folds = chain(built(3), 3)
    first, second = (tensors for _, tensors, _ in folds[:2])
    for tensors in (first, second):
        assert not tensors["lora_b"].any()
        assert 0.9 / 20**0.5 < tensors["lora_a"].abs().max() <= 1 / 20**0.5
    assert not torch.equal(first["lora_a"], second["lora_a"])


@pytest.mark.parametrize("stack_rank", [2, 3, 5, 8])
def test_a_bounded_stack_keeps_the_nearest_of_its_rank_and_says_how_near(stack_rank: int) -> None:
    method = built(4, stack_rank)
    folds, largest = chain(method, 4), 0.0
    for before_OI, tensors, error in folds[:-1]:
        after_OI = change(method, tensors)
        u, sigma, v = torch.linalg.svd(before_OI.double())
        best_OI = u[:, :stack_rank] * sigma[:stack_rank] @ v[:stack_rank]
        torch.testing.assert_close(after_OI.double(), best_OI, rtol=1e-4, atol=1e-5)
        assert tensors["cola_a"].shape == (stack_rank, 20)
        distance = float((after_OI - before_OI).norm() / before_OI.norm())
        assert error == pytest.approx(distance, abs=1e-6)
        largest = max(largest, error)
    assert 0.01 < largest < 1.0


def test_a_stack_as_wide_as_the_weight_loses_nothing() -> None:
    site = replace(SITE, out_features=4, in_features=6)
    form = built(5, None, replace(PLAN, sites=(site,))).form(site)
    assert form.kept["cola_a"].shape == (4, 6) and form.kept["cola_b"].shape == (4, 4)
    generator = torch.Generator().manual_seed(0)
    c, d = torch.randn(7, 6, generator=generator), torch.randn(4, 7, generator=generator)
    near_c, near_d, error = nearest(c, d, 4)
    torch.testing.assert_close(near_d @ near_c, d @ c)
    assert error < 1e-12


def test_nothing_is_folded_where_nothing_was_learned() -> None:
    c, d, error = nearest(torch.randn(5, 20), torch.zeros(14, 5), 2)
    assert error == 0.0 and not (d @ c).any()


def test_the_exported_pair_is_the_delta() -> None:
    method = built(3, 4)
    form = method.form(SITE)
    assert form.to_lora is not None
    for _, tensors, _ in chain(method, 3):
        a_LI, b_OL = form.to_lora(tensors)
        assert a_LI.shape == (3 + 4, 20) and b_OL.shape == (14, 3 + 4)
        torch.testing.assert_close(SCALE * b_OL @ a_LI, change(method, tensors))


def test_the_default_stack_has_room_for_all_pairs_up_to_eight() -> None:
    site = replace(SITE, in_features=900, out_features=700)
    wide, context = replace(site, out_features=10), replace(PLAN, sites=(site,))
    for links, rank in ((2, 3), (3, 6), (9, 24), (20, 24)):
        form = built(links, None, context).form(site)
        assert form.kept["cola_a"].shape == (rank, 900)
        assert built(links, None, context).form(wide).kept["cola_b"].shape == (10, min(rank, 10))
    # More than there are pairs would stay empty.
    assert built(2, 500, context).form(site).kept["cola_a"].shape == (3, 900)


@pytest.mark.parametrize(("out", "wide"), [(768, 768), (3072, 768), (4096, 4096), (11008, 4096)])
def test_parameters_that_train_are_those_of_lora(out: int, wide: int) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    form = built(3, None, replace(PLAN, sites=(site,))).form(site)
    assert sum(torch.Size(s.shape).numel() for s in form.tensors.values()) == 8 * (out + wide)


def test_one_link_is_lora_itself() -> None:
    method = built(1)
    assert method == Method(name="cola")


def test_links_are_equal_stages_that_each_begin_anew() -> None:
    method = built(3)
    assert method.stages == (6, 13, 20) and method.stage_resets_moments and not method.redraws
    assert method.rewriting is not None
    assert [s for s in range(21) if method.rewriting.at(s)] == [6, 13]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cola_links": 0}, "cola_links must be at least 1, got 0"),
        ({"cola_links": -1, "cola_stack_rank": 0}, "got -1; --cola_stack_rank must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ColaOptions(**options)


def test_what_does_not_fit_the_run_is_refused_with_what_does() -> None:
    with pytest.raises(ValueError, match="cola_links is 21,.* 21 st.* 20 steps .* most 20 st"):
        built(21)
    warm = replace(PLAN, warmup_steps=7)
    with pytest.raises(ValueError, match=r"cola_links is 3.*warmup_steps is 7\). At most 2 st"):
        built(3, None, warm)
    built(2, None, warm)
    with pytest.raises(ValueError, match="cola_stack_rank is 15, but q is only 14 x 20. Take 14"):
        built(3, 15)
    built(3, 14)


def test_a_real_run_folds_and_starts_anew(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    options = {"method": "cola", "max_steps": 9, "cola_stack_rank": 6, "save_every": 1, "rank": 4}
    said, _ = ranks(2, "tests.work.run:train", flags=tiny.flags(tmp_path, **options))
    rows = read_records(tmp_path / "decisions.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["fold_error"] == 0.0 < rows[1]["fold_error"] < 1.0
    assert "step 3: fold_error 0\n" in said
    for step in range(1, 10):
        filled = torch.cat(list(saved(tmp_path, "kept", step).values())).any()
        assert filled == (step >= 3)
        b = torch.cat([w for n, w in saved(tmp_path, "master", step).items() if "lora_b" in n])
        assert b.any() == (step not in (3, 6))
        born = torch.cat(list(saved(tmp_path, "born", step).values()))
        assert (born == (step - 1) // 3 * 3).all()
    stages = read_records(tmp_path / "stages.jsonl")
    assert [row["step"] for row in stages] == [3, 6, 9]
    ranks_now = sum(rows[-1]["ranks"].values())
    assert ranks_now > 0 and {row["live_ranks"] for row in stages} == {ranks_now}
    story = read_run(tmp_path)
    assert len(story.decisions) == 2 and story.stages == []
