"""The laws of ``test_methods.py`` that need a real run: real ZeRO-3, one to four ranks, NF4, fp32.

the decisions and numbers of a run do not depend on ranks, accumulation, checkpointing, or where
ZeRO-3 cuts
a run that stops before, at and after decisions is, bit for bit, the run in one go
a run that goes from 3 ranks to 1 and 2 comes to the same decisions and losses
a loss eight times as large gives the same masks
with sparsity off a method is plain LoRA, or the fixed-rank form of its own delta
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora_dist import checkpoint
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.laws import LAWS
from tests.tiers import in_full, some

STEPS, SAVED, TWELVE_ROWS = 12, (4, 8, 12), 12
KEYS = ("master", "live", "born", "exp_avg", "exp_avg_sq", "stat0", "stat1", "kept", "squares")
TIES = 1e-4
"""Share of entries, or of components, that may be decided otherwise where scores lie within
rounding of the threshold: in each row of decisions, and in each mask that was saved."""
COUNTED = ("live", "ranks")
"""What a row of decisions counts for every site. The rest is its step and the method's facts."""

DECIDING = [name for name in METHODS if LAWS[name].decides]
every_method = pytest.mark.parametrize("name", METHODS)
deciding = pytest.mark.parametrize("name", DECIDING)


def flags(tiny: TinyRun, folder: Path, name: str, **options: object) -> list[str]:
    """A run of 12 rows a step on two ranks that decides several times."""
    usual: dict[str, object] = {"method": name, "max_steps": STEPS, "micro_batch_size": 6}
    usual |= {"learning_rate": 2e-3, "max_grad_norm": 0, "rank": 6, "save_every": SAVED[0]}
    return tiny.flags(folder, **usual | LAWS[name].on | options)


def saved(run: Path, key: str, step: int = STEPS) -> dict[str, Tensor]:
    """Every trained tensor's ``key`` from a checkpoint, put together from the ranks' files."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    manifest = checkpoint.read_manifest(folder)
    slices = checkpoint.SavedSlices.of(folder, manifest)
    if key in ("kept", "squares"):
        names = {k.partition("/")[2] for f in slices.files for k in f.keys() if k.startswith(key)}  # noqa: SIM118
        sizes = {name: max(sum(o[name]) for o in slices.offsets) for name in names}
        return {name: slices.entries(key, name, 0, size) for name, size in sizes.items()}
    return {
        name: slices.entries(key, name, 0, prod(shape))
        for name, shape in manifest["tensors"].items()
        if any(f"{key}/{name}" in file.keys() for file in slices.files)  # noqa: SIM118
    }


def kept(run: Path) -> dict[str, Tensor]:
    """What its last checkpoint has that never trains: bits, places, numbers; squares of inputs."""
    trained, found = Trained.open(run), saved(run, "squares")
    for name, raw in saved(run, "kept").items():
        form = next(trained.method.form(s) for s in trained.sites if name.startswith(f"{s.name}."))
        spec = form.kept[name.rpartition(".")[2]]
        found[name] = raw[: spec.num_bytes].view(spec.dtype)
    return found


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_records(run / "metrics.jsonl") if "loss" in row]


def decisions(run: Path) -> list[dict[str, Any]]:
    return read_records(run / "decisions.jsonl") if (run / "decisions.jsonl").exists() else []


def masks(run: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """What lives after a step, and what is zero: AdaLoRA and SoRA zero what may come back."""
    zero = {name: w == 0 for name, w in saved(run, "master", step).items()}
    return {"live": saved(run, "live", step), "zero": zero}


def at_the_threshold(one: Path, other: Path) -> dict[str, float]:
    """The shares of entries, or of components, that two runs decided otherwise, by where."""
    shares = {}
    for row, theirs in zip(decisions(one), decisions(other), strict=True):
        for what in COUNTED:
            mine, others = row.pop(what), theirs.pop(what)
            assert mine.keys() == others.keys()
            apart = sum(abs(mine[site] - others[site]) for site in mine)
            shares[f"{what} in the row of step {row['step']}"] = apart / max(sum(mine.values()), 1)
        assert row == theirs
    for step in SAVED:
        after, their_after = masks(one, step), masks(other, step)
        for what, mask in after.items():
            assert mask.keys() == their_after[what].keys()
            apart = torch.cat([mask[n] != their_after[what][n] for n in mask])
            shares[f"what is {what} after step {step}"] = float(apart.double().mean())
    return {where: share for where, share in shares.items() if share}


def same_where_alike(one: Path, other: Path) -> None:
    """Entries of which two runs decided alike have one age and one value."""
    live, others = saved(one, "live"), saved(other, "live")
    for key, atol in (("born", 0.0), ("master", 1e-5)):
        theirs = saved(other, key)
        for n, t in saved(one, key).items():
            same = live[n] == others[n]
            torch.testing.assert_close(theirs[n][same], t[same], rtol=0, atol=atol)


@pytest.fixture(scope="session")
def reference(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Method -> the folder of its run on two ranks, 12 rows a step, everything sharded."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        ranks(2, "tests.work.run:train_toy", flags=flags(tiny, folder, name))
        return folder

    return run


@deciding
def test_it_decides_several_times_and_prunes_or_grows(reference: Any, name: str) -> None:
    rows = decisions(reference(name))
    assert len(rows) >= 3
    shapes = [(sum(r["ranks"].values()), sum(r["live"].values())) for r in rows]
    assert shapes[0] != shapes[-1]


LAYOUTS = {
    "one rank, accumulation, checkpointing": (
        1,
        {
            "micro_batch_size": 6,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
    ),
    "three ranks, all sharded": (3, {"micro_batch_size": 4, "ds_config": "threshold 0"}),
    "four ranks, all sharded": (4, {"micro_batch_size": 3, "ds_config": "threshold 0"}),
}


def laid_out() -> Iterator[Any]:
    """Every method in every layout, left to ``make test-all``: in ``make test`` the parts of a
    method's course have every pair of them. Four ranks for what ranks decide together."""
    for name in METHODS:
        for layout in LAYOUTS:
            if "four" not in layout or LAWS[name].decides:
                yield in_full(name, layout)


def all_sharded(folder: Path) -> Path:
    """An engine file under which every parameter is sharded, however small."""
    engine = json.loads(Path("ds_configs/zero3.json").read_text())
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "engine.json").write_text(json.dumps(engine))
    return folder / "engine.json"


@pytest.mark.parametrize(("name", "layout"), laid_out())
def test_the_layout_changes_no_decision_no_mask_and_no_parameter(
    ranks: Ranks, tiny: TinyRun, reference: Any, tmp_path: Path, name: str, layout: str
) -> None:
    world, options = LAYOUTS[layout]
    if options.get("ds_config"):
        options = options | {"ds_config": all_sharded(tmp_path)}
    ranks(world, "tests.work.run:train_toy", flags=flags(tiny, tmp_path / "run", name, **options))
    one, other = reference(name), tmp_path / "run"
    otherwise = at_the_threshold(one, other)
    if otherwise:
        print(f"{name}, {layout}, at the threshold: {otherwise}")
    assert max(otherwise.values(), default=0.0) <= TIES
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    same_where_alike(one, other)
    theirs = kept(other)
    for n, t in kept(one).items():
        if t.is_floating_point():
            torch.testing.assert_close(theirs[n], t, rtol=1e-4, atol=1e-5)
        else:
            assert float((theirs[n] != t).double().mean()) <= TIES, n


@pytest.mark.parametrize("name", some(METHODS, "lora adalora increlora roselora sora shira"))
def test_stopping_before_at_and_after_decisions_changes_no_bit(
    ranks: Ranks, tiny: TinyRun, reference: Any, tmp_path: Path, name: str
) -> None:
    one = reference(name)
    steps = [row["step"] for row in decisions(one)] or [7]
    at = steps[len(steps) // 2]
    # Where nothing is decided one stop is like another.
    lasts = [at - 1, at, at + 1] if decisions(one) else [at]
    for i, stop in enumerate([*({"stop_after": last} for last in lasts), {}]):
        resume = {"resume": "auto"} if i else {}
        words = flags(tiny, tmp_path, name, **stop, **resume)
        ranks(2, "tests.work.run:train_toy", flags=words)
    for key in KEYS:
        straight, resumed = saved(one, key), saved(tmp_path, key)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[n], resumed[n]) for n in straight), key
    assert decisions(tmp_path) == decisions(one)
    # All that a row says, but for time, memory and what this program alone received.
    measured = ("tokens_per_s", "bytes", "held_out")
    told = [
        [{k: v for k, v in row.items() if not any(m in k for m in measured)} for row in rows]
        for rows in (read_records(run / "metrics.jsonl")[1:] for run in (one, tmp_path))
    ]
    assert told[0] == told[1]


RANKS = (3, 1, 2)
"""In the order in which a run goes over them."""
FEATURES = ("accumulation", "checkpointing", "all sharded")


def course(name: str) -> list[tuple[int, str]]:
    """(ranks, feature) of each part of a method's run. Another method has the features in another
    order, so that every pair of method, ranks and feature stands in one of the courses."""
    number = list(METHODS).index(name)
    return [(world, FEATURES[(number + i) % len(FEATURES)]) for i, world in enumerate(RANKS)]


def laid_out_as(world: int, feature: str, folder: Path) -> dict[str, object]:
    """Options of a part of a run: twelve rows a step."""
    parts = 2 if feature == "accumulation" else 1
    layout: dict[str, object] = {"micro_batch_size": TWELVE_ROWS // world // parts}
    layout |= {"gradient_accumulation_steps": parts}
    layout |= {"gradient_checkpointing": feature == "checkpointing"}
    return layout | ({"ds_config": all_sharded(folder)} if feature == "all sharded" else {})


def test_every_pair_of_method_ranks_and_feature_stands_in_a_course() -> None:
    rows = [(name, *part) for name in METHODS for part in course(name)]
    pairs = {(i, j, row[i], row[j]) for row in rows for i, j in ((0, 1), (0, 2), (1, 2))}
    numbers = len(set(RANKS))
    assert len(pairs) == len(METHODS) * (numbers + len(FEATURES)) + numbers * len(FEATURES)


@every_method
def test_a_run_goes_on_on_other_numbers_of_ranks(
    ranks: Ranks, tiny: TinyRun, reference: Any, tmp_path: Path, name: str
) -> None:
    """3 ranks to the step before a decision, 1 through it, 2 to the end; each part with another
    feature."""
    one = reference(name)
    steps = [row["step"] for row in decisions(one)] or [7]
    at = steps[len(steps) // 2]
    for (world, feature), last in zip(course(name), (at - 1, at, STEPS), strict=True):
        layout = laid_out_as(world, feature, tmp_path) | {"stop_after": last, "resume": "auto"}
        words = flags(tiny, tmp_path / "run", name, **layout)
        (told, *_) = ranks(world, "tests.work.run:train_toy", flags=words)
        assert bool(re.search(r"; ranks \d -> \d", told)) == (last != at - 1)
    run = tmp_path / "run"
    assert max(at_the_threshold(one, run).values(), default=0.0) <= TIES
    assert losses(run) == pytest.approx(losses(one), abs=1e-4)
    same_where_alike(one, run)


@pytest.mark.parametrize("name", some(DECIDING, "increlora roselora"))
def test_a_loss_eight_times_as_large_gives_the_same_masks(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    masks = []
    for scale in (1.0, 8.0):
        folder = tmp_path / str(scale)
        penalty = {k: scale * v for k, v in LAWS[name].penalty.items()}
        words = flags(tiny, folder, name, adam_eps=1e-16, **penalty)
        ranks(2, "tests.work.run:train_scaled", flags=words, loss_scale=scale)
        masks.append(saved(folder, "live"))
        ranks_of = [row["ranks"] for row in decisions(folder)]
        masks[-1] |= {"ranks": torch.tensor([list(r.values()) for r in ranks_of])}
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


@pytest.fixture(scope="session")
def switched_off(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Method -> the losses of its run with nothing to prune or grow, all of it alive at the end."""

    @cache
    def run(name: str) -> list[float]:
        folder = tmp_path_factory.mktemp(f"{name}_off")
        # Clipping would count the gradients of gates, which LoRA does not have.
        usual = {"method": name, "max_steps": 12, "rank": 6, "max_grad_norm": 0}
        words = tiny.flags(folder, **usual | LAWS[name].off)
        ranks(2, "tests.work.run:train_toy", flags=words)
        assert all(mask.all() for mask in saved(folder, "live", 12).values())
        return losses(folder)

    return run


@pytest.mark.parametrize("name", [n for n in METHODS if LAWS[n].off and LAWS[n].off_is])
def test_off_is_the_fixed_rank_method_step_for_step(switched_off: Any, name: str) -> None:
    assert switched_off(name) == switched_off(LAWS[name].off_is)
