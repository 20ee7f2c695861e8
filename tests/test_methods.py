"""The laws every method keeps, a row of the table each; and a new one, trained on real ranks.

A method costs three files: its own, its line in ``methods/__init__.py``, its row in LAWS here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sparse_lora_dist.methods import METHODS, Method, MethodFactory
from sparse_lora_dist.methods.base import NoOptions, Site
from sparse_lora_dist.methods.roselora import RoseLoraOptions
from sparse_lora_dist.metrics import read_rows
from tests.conftest import Ranks
from tests.tiny_run import TinyRun
from tests.toy_method import TOY, ToyOptions
from tests.whole_score import WholeScore

STEPS = 8
SITE = Site(name="layer", in_features=24, out_features=20, rank=6)

LAWS: dict[str, tuple[MethodFactory, Any]] = {
    # method: its factory, and options under which it prunes nothing
    "lora": (METHODS["lora"], NoOptions()),
    "roselora": (METHODS["roselora"], RoseLoraOptions(roselora_keep=1.0)),
    "toy": (TOY, ToyOptions(toy_keep=1.0)),
}


def test_every_method_has_a_row() -> None:
    assert set(METHODS) <= set(LAWS)


@pytest.fixture(params=LAWS)
def factory(request: pytest.FixtureRequest) -> MethodFactory:
    return LAWS[request.param][0]


@pytest.fixture
def method(factory: MethodFactory) -> Method:
    return factory.build(factory.options(), STEPS)


def first_values(method: Method) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, spec in method.tensors(SITE).items():
        values[name] = torch.empty(spec.shape)
        spec.init(values[name], generator)
    return values


def trained_values(method: Method) -> dict[str, Tensor]:
    return {
        name: torch.randn(spec.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, spec) in enumerate(method.tensors(SITE).items())
    }


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(method: Method, w: Tensor, grads: list[Tensor]) -> tuple[Tensor, ...]:
    stats = tuple(torch.zeros_like(w) for _ in range(method.n_stats))
    for grad in grads:
        stats = method.observe(stats, w, grad)
    return stats


def test_the_delta_is_nothing_at_first(method: Method) -> None:
    assert (method.delta(random(5, 24), first_values(method), 2.0) == 0).all()


def test_the_delta_is_that_of_the_exported_pair(method: Method) -> None:
    x, values = random(5, 24), trained_values(method)
    a_RI, b_OR = method.to_lora(values)
    torch.testing.assert_close(method.delta(x, values, 2.0), 2.0 * x @ a_RI.t() @ b_OR.t())


def test_observing_two_shards_is_observing_the_whole(method: Method) -> None:
    w, grads = random(101), [random(101, seed=s) for s in (2, 3)]
    whole = observed(method, w, grads)
    assert len(whole) == method.n_stats
    halves = [
        observed(method, w[cut], [g[cut] for g in grads]) for cut in (slice(37), slice(37, 101))
    ]
    for stat, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(stat, torch.cat([first, second]))


def test_scoring_and_projecting_are_elementwise(method: Method) -> None:
    w, grads, cut = random(101), [random(101, seed=2)], 37
    stats = observed(method, w, grads)
    if stats:
        parts = [method.score(tuple(s[c] for s in stats)) for c in (slice(cut), slice(cut, 101))]
        assert torch.equal(method.score(stats), torch.cat(parts))
    halves = [method.project(w[c].clone(), 0.1) for c in (slice(cut), slice(cut, 101))]
    assert torch.equal(method.project(w.clone(), 0.1), torch.cat(halves))


def decisions(method: Method) -> list[dict[str, Tensor]]:
    scores = {
        f"layer.{name}": random(*spec.shape, seed=i).abs()
        for i, (name, spec) in enumerate(method.tensors(SITE).items())
    }
    before = {name: score.clone() for name, score in scores.items()}
    whole = {name: WholeScore(score) for name, score in scores.items()}
    masks = [method.decide(s, whole) for s in range(1, STEPS + 1) if method.decides_at(s)]
    assert all(torch.equal(before[name], scores[name]) for name in scores), "decide is pure"
    for mask in (m for decision in masks for m in decision.items()):
        assert mask[1].shape == (scores[mask[0]].numel(),) and mask[1].dtype == torch.bool
    return masks


def test_equal_scores_give_equal_masks(method: Method) -> None:
    for first, second in zip(decisions(method), decisions(method), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", LAWS)
def test_off_means_plain_lora(name: str) -> None:
    factory, off = LAWS[name]
    method = factory.build(off, STEPS)
    assert all(mask.all() for masks in decisions(method) for mask in masks.values())
    w = random(101)
    assert torch.equal(method.project(w.clone(), 0.1), w)


# --- the toy method in a real run -----------------------------------------------------------------


def toy_flags(tiny: TinyRun, folder: Path, **options: object) -> list[str]:
    return tiny.flags(folder, **{"method": "toy", "max_steps": STEPS, "save_every": 4} | options)


@pytest.fixture(scope="module")
def toy_run(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    ranks(2, "tests.run_work:train_toy", flags=toy_flags(tiny, folder))
    return folder


def saved(run: Path, key: str, step: int = STEPS) -> dict[str, Tensor]:
    """Every trained tensor's ``key`` from a checkpoint, put together from the ranks' files."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    whole: dict[str, list[tuple[int, Tensor]]] = {}
    for path in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name, (start, _) in json.loads(file.metadata()["offsets"]).items():
                whole.setdefault(name, []).append((start, file.get_tensor(f"{key}/{name}")))
    return {
        name: torch.cat([t for _, t in sorted(p, key=lambda x: x[0])]) for name, p in whole.items()
    }


def exported(run: Path) -> dict[str, Tensor]:
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(end, ours): weight.flatten()
        for key, weight in weights.items()
        for end, ours in names.items()
        if key.endswith(end)
    }


def test_a_new_method_prunes_as_it_says(toy_run: Path) -> None:
    counts = [row["live_entries"] for row in read_rows(toy_run / "metrics.jsonl")[1:]]
    assert counts[0] == 8192
    assert counts[-1] == 8192 // 2
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 5


def test_what_is_dead_is_zero_in_master_live_copy_and_export(toy_run: Path) -> None:
    live, master, adapter = saved(toy_run, "live"), saved(toy_run, "master"), exported(toy_run)
    assert live.keys() == master.keys() == adapter.keys() and len(live) == 28
    for name, mask in live.items():
        assert int(mask.sum()) == mask.numel() // 2
        assert (master[name][~mask] == 0).all()
        # The export is made of the engine's live copy.
        assert (adapter[name][~mask] == 0).all()
        assert (adapter[name][mask] != 0).all()
        assert torch.equal(adapter[name], master[name])


def test_moments_are_saved_for_live_entries_only_and_statistics_for_all(toy_run: Path) -> None:
    live = saved(toy_run, "live")
    for key in ("exp_avg", "exp_avg_sq", "stat0"):
        for name, values in saved(toy_run, key).items():
            whole = live[name].numel()
            assert values.numel() == (whole if key == "stat0" else int(live[name].sum()))


@pytest.mark.parametrize("world", [1, 3])
def test_masks_do_not_depend_on_the_number_of_ranks(
    ranks: Ranks, tiny: TinyRun, toy_run: Path, tmp_path: Path, world: int
) -> None:
    reference, rows = toy_run, 4
    if world == 3:  # 6 rows a step, as one rank would take them
        reference, rows = tmp_path / "one", 6
        flags = toy_flags(tiny, reference, micro_batch_size=rows)
        ranks(1, "tests.run_work:train_toy", flags=flags)
    flags = toy_flags(tiny, tmp_path / "run", micro_batch_size=rows // world)
    ranks(world, "tests.run_work:train_toy", flags=flags)
    masks, others = saved(reference, "live"), saved(tmp_path / "run", "live")
    assert masks.keys() == others.keys()
    assert all(torch.equal(masks[name], others[name]) for name in masks)
    losses = [
        [r["loss"] for r in read_rows(f / "metrics.jsonl")[1:]]
        for f in (reference, tmp_path / "run")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_pruned_run_resumes_bit_for_bit(
    ranks: Ranks, tiny: TinyRun, toy_run: Path, tmp_path: Path
) -> None:
    for options in ({"stop_after": 4}, {"resume": "auto"}):
        ranks(2, "tests.run_work:train_toy", flags=toy_flags(tiny, tmp_path, **options))
    for key in ("master", "live", "exp_avg", "exp_avg_sq", "stat0"):
        straight, resumed = saved(toy_run, key), saved(tmp_path, key)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight), key


def test_options_of_a_method_that_do_not_fit_are_told_with_the_others(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = toy_flags(tiny, tmp_path, toy_keep=1.5, rank=0)
    (message,) = ranks(1, "tests.run_work:refusal_of_toy", flags=flags)
    assert "toy_keep must be in (0, 1], got 1.5" in message
    assert "rank must be at least 1" in message
