"""Tensors that all linears share: one parameter each under real ZeRO-3, against plain torch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lora_dist import methods
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import RunContext, trained_specs
from sparse_lora_dist.plan.forecast import forecast
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.show import checkpoint_table as show
from tests.conftest import Ranks
from tests.fixtures.reference import loss_of_batches, whole_model
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.toy_method import ToyOptions
from tests.fixtures.toy_shared import TOY_SHARED, form
from tests.tiers import grid
from tests.training.test_laws import saved

RANK, ALPHA = 4, 6.0
NAMES = [f"model.layers.{n}.self_attn.{m}_proj" for n in range(2) for m in "qo"]
SITES = tuple(Site(name=n, in_features=64, out_features=64, rank=RANK) for n in NAMES)
PLAN = RunContext(total_steps=8, warmup_steps=0, learning_rate=1e-2, sites=SITES)
TENSORS_OF = {"lora_a": (RANK, 64), "lora_b": (64, RANK)}
TENSORS = {f"{NAMES[0]}.lora_a", f"{NAMES[0]}.lora_b", *(f"{name}.toy_c" for name in NAMES)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine file under which nothing stays whole between its uses."""
    file = tmp_path_factory.mktemp("shared") / "engine.json"
    content = json.loads(Path("ds_configs/zero3.json").read_text())
    content["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
    file.write_text(json.dumps(content))
    return file


def flags(tiny: TinyRun, folder: Path, **options: object) -> list[str]:
    usual = {"method": "toy_shared", "target_modules": "q_proj,o_proj", "rank": RANK}
    return tiny.flags(folder, **usual | {"alpha": ALPHA} | options)


class SharedOverLinear(nn.Module):
    """y = x W^T + (alpha / rank) x A^T diag(c) B^T"""

    def __init__(self, base: nn.Module, a_RI: Tensor, b_OR: Tensor, c_R: Tensor) -> None:
        super().__init__()
        self.base, self.lora_a, self.lora_b, self.toy_c = base, a_RI, b_OR, c_R

    def forward(self, x: Tensor) -> Tensor:
        delta_OI = self.lora_b @ torch.diag(self.toy_c) @ self.lora_a
        y: Tensor = self.base(x) + ALPHA / RANK * x @ delta_OI.t()
        return y


def first_value(name: str) -> nn.Parameter:
    spec = form(SITES[0]).tensors[name.rpartition(".")[2]]
    value = torch.empty(spec.shape)
    spec.init(value, torch.Generator().manual_seed(seed_of(0, name)))
    return nn.Parameter(value)


def in_one_process(tiny: TinyRun, batches: list[Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as autograd has them of a model whose modules hold the same tensors."""
    model = whole_model(tiny.model, quantization="nf4").requires_grad_(False).train()
    a_RI, b_OR = (first_value(f"{NAMES[0]}.{key}") for key in ("lora_a", "lora_b"))
    for name in NAMES:
        c_R = first_value(f"{name}.toy_c")
        model.set_submodule(name, SharedOverLinear(model.get_submodule(name), a_RI, b_OR, c_R))
    loss = loss_of_batches(model, batches)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


@grid(
    "sharded layout checkpointing",
    [False, True],
    [(1, 12, 1), (1, 3, 4), (2, 3, 2), (3, 2, 2)],
    [False, True],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_gradient_is_the_sum_over_all_linears_taken_once_a_backward(
    ranks: Ranks,
    tiny: TinyRun,
    engine: Path,
    tmp_path: Path,
    layout: tuple[int, int, int],
    checkpointing: bool,
    sharded: bool,
) -> None:
    world, rows, times = layout
    options: dict[str, object] = {"ds_config": engine} if sharded else {}
    words = flags(
        tiny,
        tmp_path,
        max_steps=1,
        micro_batch_size=rows,
        gradient_accumulation_steps=times,
        gradient_checkpointing=checkpointing,
        **options,
    )
    everyone = ranks(world, "tests.work.shared:first_step", flags=words)
    batches = [batch for seen, _ in everyone for batch in seen.batches]
    assert len(batches) == world * times
    loss, grads = in_one_process(tiny, batches)
    assert grads.keys() == TENSORS
    for seen, taken in everyone:
        assert taken == [times] * len(TENSORS)
        assert seen.loss == pytest.approx(loss, rel=1e-5)
        assert seen.gradients.keys() == TENSORS
        for name, grad in grads.items():
            assert grad.norm() > 0
            assert (seen.gradients[name] - grad).norm() < 1e-5 * grad.norm(), name


@pytest.fixture(scope="module")
def run(
    ranks: Ranks, tiny: TinyRun, engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two ranks, nothing whole between its uses, a decision at each second step."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    words = flags(tiny, folder, max_steps=8, micro_batch_size=6, ds_config=engine)
    ranks(2, "tests.work.shared:train", flags=words)
    return folder


def test_it_goes_on_on_other_ranks_with_what_all_share(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    for world, last in ((3, 3), (1, 6), (2, 8)):
        options = {"micro_batch_size": 12 // world, "stop_after": last, "resume": "auto"}
        words = flags(tiny, tmp_path, max_steps=8, **options)
        ranks(world, "tests.work.shared:train", flags=words)
    one, other = saved(run, "master", 8), saved(tmp_path, "master", 8)
    assert one.keys() == TENSORS
    for name, w in one.items():
        torch.testing.assert_close(other[name], w, rtol=0, atol=1e-5)


def test_decisions_count_what_all_share_once(run: Path) -> None:
    rows = read_records(run / "decisions.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    shared, own = 2 * RANK * 64, RANK
    assert list(rows[-1]["live"].values()) == [(shared + own) // 2, *(3 * [own // 2])]
    masters = saved(run, "master", 8)
    assert sum(int((w == 0).sum()) for w in masters.values()) == (shared + 4 * own) // 2


def test_a_checkpoint_shows_and_gives_what_all_share(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "toy_shared", TOY_SHARED)
    trained = Trained.open(run)
    found = list(show.modules(trained))
    assert [m.entries for m in found] == [2 * RANK * 64 + RANK, *(3 * [RANK])]
    assert sum(m.alive for m in found) == (2 * RANK * 64 + 4 * RANK) // 2
    masters = saved(run, "master", 8)
    a_RI, b_OR = (masters[f"{NAMES[0]}.{key}"].view(TENSORS_OF[key]) for key in TENSORS_OF)
    for module, site in zip(found, trained.sites, strict=True):
        change = trained.change(site)
        assert change is not None
        wanted = ALPHA / RANK * b_OR @ torch.diag(masters[f"{site.name}.toy_c"]) @ a_RI
        torch.testing.assert_close(change.rows(0, 64), wanted)
        assert module.norm == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_the_planner_counts_what_all_share_once() -> None:
    assert trained_specs(TOY_SHARED.build(ToyOptions(), PLAN), SITES).keys() == TENSORS
    live = forecast(TOY_SHARED, ToyOptions(toy_keep=0.5), PLAN).on(1)
    assert (live.first, live.peak) == (1.0, 1.0)
    assert live.last == pytest.approx(0.5, abs=0.01)
