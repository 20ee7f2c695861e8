"""RoseLoRA: golden numbers of the paper, and real sharded runs that prune as it says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_lora_dist.methods import RunContext
from sparse_lora_dist.methods.protocol.form import Site, Update
from sparse_lora_dist.methods.protocol.method import Decision, Stats
from sparse_lora_dist.methods.roselora import (
    RoseLoraOptions,
    keep_within_components,
    roselora,
    smooth_sensitivity,
)
from sparse_lora_dist.methods.shared.schedules import cubic_keep
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.whole_scores import WholeScores
from tests.training.test_laws import saved

STEPS, KEEP, RANK = 12, 0.1, 4


def context(steps: int) -> RunContext:
    site = Site(name="q", in_features=768, out_features=768, rank=8)
    return RunContext(total_steps=steps, warmup_steps=0, learning_rate=1e-3, sites=(site,))


@pytest.mark.parametrize(
    ("step", "keep"),
    [(1, 1.0), (3, 1.0), (4, 0.842021), (10, 0.243365), (15, 0.074171), (19, 0.050193), (20, 0.05)],
)
def test_the_keep_schedule_is_the_papers(step: int, keep: float) -> None:
    assert cubic_keep(step, begin=3, end=20, final=0.05) == pytest.approx(keep, abs=5e-7)


def test_the_average_starts_at_zero_and_tends_to_a_constant_sensitivity() -> None:
    w, grad, smoothed = torch.full((3,), -2.0), torch.full((3,), 0.5), torch.zeros(3)
    for step in range(1, 6):
        smoothed = smooth_sensitivity(smoothed, w, grad, beta=0.8)
        torch.testing.assert_close(smoothed, torch.full((3,), 1 - 0.8**step))


def components(size: int = 768) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.lora_a": (8, size), "q.lora_b": (size, 8)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def test_each_row_of_a_and_column_of_b_keeps_its_top_share() -> None:
    scores = components()
    masks = keep_within_components(WholeScores(scores), 0.05)
    a_RI, b_OR = (masks[n].view(scores[n].shape) for n in scores)
    assert (a_RI.sum(1) == 38).all() and (b_OR.sum(0) == 38).all()  # floor(.05 * 768)
    for row, mask in zip(scores["q.lora_a"], a_RI, strict=True):
        assert row[mask].min() > row[~mask].max()


@pytest.mark.parametrize(("size", "kept"), [(256, 14), (768, 40), (4096, 206), (11008, 552)])
def test_preset_released_keeps_as_many_as_the_released_code(size: int, kept: int) -> None:
    """d - int(d (1 - tau)) + 1, one or two more than tau d."""
    method = roselora(RoseLoraOptions(roselora_preset="released", roselora_keep=0.05), context(25))
    dead = method.decide(20, WholeScores(components(size))).zero
    assert ((~dead["q.lora_a"]).view(8, size).sum(1) == kept).all()
    assert ((~dead["q.lora_b"]).view(size, 8).sum(0) == kept).all()


def test_a_share_that_is_a_whole_number_is_kept_whole() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    masks = keep_within_components(WholeScores({"q.lora_a": torch.rand(2, 100)}), 0.29)
    assert (masks["q.lora_a"].view(2, 100).sum(1) == 29).all()


def test_a_component_never_dies_whole() -> None:
    masks = keep_within_components(WholeScores({"q.lora_a": torch.rand(3, 10)}), 0.01)
    assert (masks["q.lora_a"].view(3, 10).sum(1) == 1).all()


def product_zeros(scores: dict[str, Tensor], keep: float) -> float:
    """The share of zeros in the product of what is kept."""
    masks = keep_within_components(WholeScores(scores), keep)
    a_RI, b_OR = (masks[n].view(s.shape).float() for n, s in scores.items())
    return float((b_OR @ a_RI == 0).double().mean())


def test_the_product_is_as_sparse_as_proposition_1_promises() -> None:
    zeros = product_zeros(components(), 0.05)
    assert zeros >= 1 - 8 * 0.05**2
    # Random independent supports: (1 - tau^2)^R, with tau = 38 / 768.
    assert (1 - (38 / 768) ** 2) ** 8 == pytest.approx(0.9806, abs=5e-5)
    assert zeros == pytest.approx(0.9806, abs=2e-4)


def test_components_that_share_no_entry_meet_the_bound_and_equal_ones_are_one() -> None:
    apart, equal = components(800), components(800)
    for i, row in enumerate(apart["q.lora_a"]):
        row[40 * i : 40 * (i + 1)] += 1.0
    equal["q.lora_a"][:] = equal["q.lora_a"][0]
    equal["q.lora_b"][:] = equal["q.lora_b"][:, :1]
    assert product_zeros(apart, 0.05) == pytest.approx(1 - 8 * 0.05**2, abs=1e-12)
    assert product_zeros(equal, 0.05) == pytest.approx(1 - 0.05**2, abs=1e-12)


def test_bad_options_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        RoseLoraOptions(roselora_keep=0.0, roselora_begin=0.9, roselora_end=0.8, roselora_beta=1.0)
    for word in ("roselora_keep must be in (0, 1]", "begin < end", "roselora_beta must be"):
        assert word in str(error.value)


def test_masks_are_held_between_decisions_and_the_end_is_always_decided() -> None:
    method = roselora(RoseLoraOptions(roselora_every=5), context(23))
    assert [s for s in range(1, 19) if method.decides_at(s)] == [5, 10, 15, 18]
    assert method.observes_until == 18


def test_nothing_is_decided_while_every_importance_is_zero() -> None:
    """B is zero at step 1; a decision there would prune by index."""
    for options in (RoseLoraOptions(), RoseLoraOptions(roselora_begin=0.0)):
        method = roselora(options, context(4))
        assert min(s for s in range(1, 5) if method.decides_at(s)) == 2


def test_a_run_too_short_to_prune_in_is_refused() -> None:
    for begin, steps in ((0.1, 1), (0.95, 10)):
        with pytest.raises(ValueError, match=f"the run has {steps}"):
            roselora(RoseLoraOptions(roselora_begin=begin, roselora_end=1.0), context(steps))


# --- the released loop, written out as methods.md and its repository describe it -----------------

RELEASED_STEPS, SIDE = 25, 64
Both = tuple[Tensor, Tensor]


class ReleasedLoop:
    """One tensor, whose rows are its components, under the released rules and torch's own Adam."""

    def __init__(self, begin: int, end: int, keep: float) -> None:
        self.w = start().requires_grad_()
        self.adam = torch.optim.Adam([self.w], lr=1e-3)
        self.importance: Tensor | None = None
        self.begin, self.end, self.keep = begin, end, keep

    def step(self, it: int, grad: Tensor) -> None:
        self.w.grad = grad.clone()
        importance = (self.w * grad).abs().detach()
        if self.importance is None:
            self.importance = importance
        else:
            self.importance = 0.8 * self.importance + 0.2 * importance
        self.adam.step()
        if it <= self.begin:
            return
        left = 1.0 - (it - self.begin) / (self.end - self.begin)
        rate = self.keep if it >= self.end else self.keep + (1 - self.keep) * left**3
        k = int(SIDE * (1 - rate))
        with torch.no_grad():
            if k > 0:
                threshold = self.importance.kthvalue(k, dim=1, keepdim=True).values
                self.w[self.importance < threshold] = 0.0
            self.w.clamp_(-3e-3, 3e-3)


def start() -> Tensor:
    return 0.01 * torch.randn(4, SIDE, generator=torch.Generator().manual_seed(0))


def gradient(step: int) -> Tensor:
    return torch.randn(4, SIDE, generator=torch.Generator().manual_seed(100 + step))


def ours(preset: str, **options: object) -> list[Both]:
    """The same tensor and its first moment after every step, by the record and SparseAdamW."""
    factory = RoseLoraOptions(
        roselora_preset=preset, roselora_begin=0.12, roselora_end=0.8, **options
    )
    site = Site(name="q", in_features=SIDE, out_features=SIDE, rank=4)
    run = RunContext(total_steps=RELEASED_STEPS, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    method = roselora(factory, run)
    flat = start().flatten()
    project = method.form(site).tensors["lora_a"].project
    optimizer = SparseAdamW([{"params": [flat], "project": project}], lr=1e-3, weight_decay=0.0)
    optimizer.set_live(flat, torch.ones(flat.numel(), dtype=torch.bool))
    stats: Stats = (torch.zeros_like(flat),)
    after = []
    for step in range(1, RELEASED_STEPS + 1):
        flat.grad = gradient(step).flatten()
        stats = method.observe(stats, flat, flat.grad, step)
        if method.decides_at(step):
            decision = method.decide(step, WholeScores({"q.lora_a": stats[0].view(4, SIDE)}))
            apply(optimizer, flat, decision)
        optimizer.step()
        moment = optimizer.dense(flat, "exp_avg")
        after.append((flat.clone().view(4, SIDE), moment.view(4, SIDE)))
    return after


def apply(optimizer: SparseAdamW, flat: Tensor, decision: Decision) -> None:
    for live in decision.live.values():
        optimizer.zero_after_step(flat, optimizer.live(flat) & ~live)
        optimizer.set_live(flat, live)
    for zero in decision.zero.values():
        optimizer.zero_after_step(flat, zero)


def theirs() -> list[Both]:
    loop, after = ReleasedLoop(begin=3, end=20, keep=0.05), []
    for step in range(1, RELEASED_STEPS + 1):
        loop.step(step, gradient(step))
        moment = loop.adam.state[loop.w]["exp_avg"]
        after.append((loop.w.detach().clone(), moment.clone()))
    return after


def first_difference(first: list[Both], second: list[Both], which: int) -> int | None:
    """The first step after which the tensors (0) or their moments (1) differ."""
    for step, (a, b) in enumerate(zip(first, second, strict=True), start=1):
        if not torch.allclose(a[which], b[which], rtol=0, atol=1e-7):
            return step
    return None


def test_preset_released_is_the_released_loop_step_for_step() -> None:
    mine, wanted = ours("released"), theirs()
    assert first_difference(mine, wanted, 0) is None and first_difference(mine, wanted, 1) is None
    assert all(torch.equal(a == 0, b == 0) for (a, _), (b, _) in zip(mine, wanted, strict=True))
    assert (wanted[-1][0] != 0).sum(1).tolist() == [5] * 4  # 64 - int(64 * .95) + 1


@pytest.mark.parametrize(
    "deviation",
    [
        {"roselora_seed_average": False},
        {"roselora_ties": "exact"},
        {"roselora_clamp": 0.0},
        {"roselora_dense_moments": False},
        {"roselora_beta": 0.9},
    ],
    ids=lambda d: next(iter(d)),
)
def test_each_of_its_rules_matters(deviation: dict[str, object]) -> None:
    mine, wanted = ours("released", **deviation), theirs()
    assert first_difference(mine, wanted, 0) or first_difference(mine, wanted, 1)


def test_live_only_and_dense_moments_part_at_the_first_mask_but_the_parameters_never() -> None:
    """A masked entry has no sensitivity: its average fades by beta, and that of a live one by no
    more. So it never overtakes one it was below, never comes back, and its momentum is zeroed with
    it in every step."""
    dense, live_only = ours("released"), ours("released", roselora_dense_moments=False)
    first = first_difference(dense, live_only, 1)
    print(f"moments of live entries only differ from dense ones from step {first} on")
    assert first == 4  # the first with a keep fraction below 1
    assert first_difference(dense, live_only, 0) is None


def test_a_released_mask_cannot_be_held_between_decisions() -> None:
    with pytest.raises(ValueError, match="roselora_every must be 1"):
        RoseLoraOptions(roselora_preset="released", roselora_every=2)


def test_the_clamp_begins_with_the_pruning() -> None:
    project = (
        roselora(RoseLoraOptions(roselora_clamp=0.5), context(100))
        .form(context(1).sites[0])
        .tensors
    )
    for spec in project.values():
        w = torch.tensor([-2.0, 0.1, 2.0])
        for step, wanted in ((10, w), (11, w.clamp(-0.5, 0.5))):
            update = Update(step=step, lr=0.1, denominator=torch.ones(3))
            assert torch.equal(spec.project(w.clone(), update), wanted)


# --- on real ranks --------------------------------------------------------------------------------


def flags(tiny: TinyRun, folder: Path, **options: object) -> list[str]:
    usual = {"method": "roselora", "roselora_keep": KEEP, "max_steps": STEPS, "save_every": 6}
    return tiny.flags(folder, **usual | {"micro_batch_size": 3, "rank": RANK} | options)


@pytest.fixture(scope="module")
def two_ranks(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roselora")
    ranks(2, "tests.work.run:train", flags=flags(tiny, folder))
    return folder


def test_the_exported_adapter_has_the_counts_of_the_schedule(two_ranks: Path) -> None:
    weights = load_file(two_ranks / "adapter" / "adapter_model.safetensors")
    for name, w in weights.items():
        within = 1 if "lora_A" in name else 0
        kept = max(1, int(KEEP * w.shape[within]))
        assert ((w != 0).sum(within) == kept).all(), name
    live = [row["live_entries"] for row in read_records(two_ranks / "metrics.jsonl")[1:]]
    assert live[-1] == sum(int((w != 0).sum()) for w in weights.values()) < live[0] / 8
    assert live == sorted(live, reverse=True)


def test_what_is_dead_is_zero_in_master_and_live_copy_under_bf16(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """Where PEFT's AdaLoRA leaves nothing masked after the next step."""
    ranks(2, "tests.work.run:train", flags=flags(tiny, tmp_path, precision="bf16"))
    master, live = saved(tmp_path, "master", STEPS), saved(tmp_path, "live", STEPS)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, mask in live.items():
        assert (master[name][~mask] == 0).all() and not mask.all()
        theirs = name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")
        assert (weights[f"base_model.model.{theirs}"].flatten()[~mask] == 0).all()


@pytest.mark.usefixtures("full")
def test_offload_and_a_learning_rate_that_overflows(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    engine = {"ds_config": "ds_configs/zero3_offload.json", "max_grad_norm": 0}
    losses = []
    for name, options in (("host", engine), ("device", {"max_grad_norm": 0})):
        ranks(2, "tests.work.run:train", flags=flags(tiny, tmp_path / name, **options))
        losses.append([r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl")[1:]])
    assert losses[0] == losses[1]
    wild = flags(tiny, tmp_path / "wild", learning_rate=1e30)
    for said in ranks(2, "tests.work.run:refusal", flags=wild):
        assert "10 steps in a row had a loss or gradient that is not finite" in said
        assert "--learning_rate" in said
