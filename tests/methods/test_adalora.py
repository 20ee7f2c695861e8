"""AdaLoRA: the paper's budget, PEFT's allocator step for step, revival, ties and hard corners.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

from dataclasses import dataclass, field

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from sparse_lora_dist.methods.adalora import AdaLoraOptions, adalora, top_components
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Decision, Method, RunContext, Stats
from sparse_lora_dist.methods.shared.schedules import cubic_budget
from sparse_lora_dist.methods.shared.triplets import triplet_scores
from tests.fixtures.whole_scores import WholeScores

TOTAL, RANK, TARGET = 50, 6, 3
SITES = (
    Site(name="first", in_features=10, out_features=14, rank=RANK),
    Site(name="second", in_features=14, out_features=7, rank=RANK),
)
OPTIONS = AdaLoraOptions(
    adalora_target_rank=TARGET, adalora_every=3, adalora_begin=0.1, adalora_final=0.2
)
BEGIN, END = 5, 40
SCALE = 2.0


def context(total_steps: int = TOTAL, sites: tuple[Site, ...] = SITES) -> RunContext:
    return RunContext(total_steps=total_steps, warmup_steps=0, learning_rate=1e-2, sites=sites)


def first_values(method: Method, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for site in SITES:
        for name, spec in method.form(site).tensors.items():
            values[f"{site.name}.{name}"] = torch.zeros(spec.shape)
            spec.init(values[f"{site.name}.{name}"], generator)
    return values


def toy_loss(method: Method, tensors: dict[str, Tensor], step: int) -> Tensor:
    """A two-layer net whose second layer has most to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    x_TI = torch.randn(32, 10, generator=generator)
    fixed = torch.Generator().manual_seed(7)
    w1_OI, w2_OI, to_learn_OI = (
        torch.randn(o, i, generator=fixed) / 4 for o, i in ((14, 10), (7, 14), (7, 14))
    )

    def added(x_TI: Tensor, site: str) -> Tensor:
        own = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{site}.")}
        return method.form(SITES[0]).delta(x_TI, own, SCALE)

    hidden_TI = torch.tanh(x_TI @ w1_OI.t() + added(x_TI, "first"))
    out_TO = hidden_TI @ w2_OI.t() + added(hidden_TI, "second")
    wanted_TO = torch.tanh(x_TI @ w1_OI.t()) @ (w2_OI + to_learn_OI).t()
    return (out_TO - wanted_TO).square().mean()


@dataclass
class Toy:
    """The whole method on one process, written out: observe, decide, Adam, apply."""

    method: Method
    w: dict[str, Tensor]
    loss_factor: float = 1.0
    stats: dict[str, Stats] = field(default_factory=dict)
    live: dict[str, Tensor] = field(default_factory=dict)
    decision: Decision = field(default_factory=Decision)

    def __post_init__(self) -> None:
        self.w = {name: t.clone().requires_grad_() for name, t in self.w.items()}
        zeros = {name: torch.zeros_like(t) for name, t in self.w.items()}
        self.stats = {name: (z, z) for name, z in zeros.items()}
        self.live = {name: torch.ones_like(t).bool() for name, t in self.w.items()}
        # No eps: Adam is then free of the gradient's scale.
        self.adam = torch.optim.Adam(self.w.values(), lr=1e-2, eps=1e-30)

    def gradients(self, step: int) -> None:
        self.adam.zero_grad()
        (toy_loss(self.method, self.w, step) * self.loss_factor).backward()

    @torch.no_grad()
    def observe(self, step: int) -> None:
        for name, w in self.w.items():
            assert w.grad is not None
            self.stats[name] = self.method.observe(self.stats[name], w, w.grad, step)

    def scores(self) -> WholeScores:
        values = {n: self.method.score(self.stats[n], w.detach()) for n, w in self.w.items()}
        return WholeScores(values, self.live)

    @torch.no_grad()
    def update(self, step: int) -> None:
        self.decision = Decision()
        if step <= END and self.method.decides_at(step):  # the one at the end is the last
            self.decision = self.method.decide(step, self.scores())
        for name, mask in self.decision.live.items():
            self.live[name] = self.live[name] & mask.view_as(self.live[name])
        self.adam.step()
        for name, w in self.w.items():
            w[~self.live[name]] = 0.0
            if name in self.decision.zero:
                w[self.decision.zero[name].view_as(w)] = 0.0

    def step(self, step: int) -> None:
        self.gradients(step)
        self.observe(step)
        self.update(step)

    def num_open(self) -> int:
        return sum(int((w != 0).sum()) for n, w in self.w.items() if n.endswith("lambda"))


def toy(options: AdaLoraOptions = OPTIONS, loss_factor: float = 1.0) -> Toy:
    method = adalora(options, context())
    return Toy(method=method, w=first_values(method), loss_factor=loss_factor)


@pytest.mark.parametrize(
    ("step", "budget"),
    [(100, 864), (101, 862), (200, 757), (400, 629), (600, 582), (799, 576), (800, 576)],
)
def test_the_budget_falls_as_in_the_paper(step: int, budget: int) -> None:
    """72 modules of rank 12, to 8 on average, between steps 100 and 800 of 1000."""
    assert cubic_budget(step, begin=100, end=800, first=864, last=576) == budget


def test_the_budget_is_flat_outside_and_never_rises() -> None:
    path = [cubic_budget(s, begin=10, end=60, first=48, last=9) for s in range(80)]
    assert path[:11] == [48] * 11 and path[60:] == [9] * 20
    assert path == sorted(path, reverse=True)


# --- PEFT's allocator, on the same parameters and gradients -------------------------------------

PEFT_NAMES = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_lambda": "lora_E"}


def peft_name(name: str) -> str:
    site, _, tensor = name.partition(".")
    return f"{site}.{PEFT_NAMES[tensor]}.default"


class PeftLayout(nn.Module):
    """Parameters of PEFT's names and shapes: lambda there is a column."""

    def __init__(self, w: dict[str, Tensor]) -> None:
        super().__init__()
        for site in SITES:
            self.add_module(site.name, nn.Module())
        for name, t in w.items():
            site_name, tensor, adapter = peft_name(name).split(".")
            shape = (-1, 1) if tensor == "lora_E" else t.shape
            parameters = nn.ParameterDict(
                {adapter: nn.Parameter(t.detach().reshape(shape).clone())}
            )
            self.get_submodule(site_name).add_module(tensor, parameters)


def peft_gradients(method: Method, model: PeftLayout, step: int) -> None:
    """The same loss, with the gradients of PEFT's parameters."""
    parameters = dict(model.named_parameters())
    model.zero_grad()
    ours = {
        f"{site.name}.{ours}": parameters[peft_name(f"{site.name}.{ours}")]
        for site in SITES
        for ours in PEFT_NAMES
    }
    flat = {n: t.view(-1) if n.endswith("lambda") else t for n, t in ours.items()}
    toy_loss(method, flat, step).backward()


def test_scores_masks_budgets_and_lambdas_are_those_of_pefts_allocator() -> None:
    ours = toy()
    model = PeftLayout(ours.w)
    theirs = RankAllocator(
        model,
        AdaLoraConfig(
            total_step=TOTAL,
            init_r=RANK,
            target_r=TARGET,
            tinit=BEGIN,
            tfinal=TOTAL - END,
            deltaT=3,
        ),
        "default",
    )
    adam = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-30)
    decisions = 0
    # PEFT goes on training A and B of what is gone, but from `END` on nothing is decided.
    for step in range(1, END + 1):
        ours.gradients(step)
        ours.observe(step)
        peft_gradients(ours.method, model, step)
        theirs.update_ipt(model)
        for name in ours.w:
            torch.testing.assert_close(
                theirs._element_score(peft_name(name)).view_as(ours.w[name]),
                ours.scores().values[name],
                rtol=1e-4,
                atol=1e-12,
            )
        ours.update(step)
        adam.step()
        budget, due = theirs.budget_schedule(step)
        assert ours.method.decides_at(step) == (due or step == END)
        if due or step == END:
            decisions += 1
            kept = theirs.mask_to_budget(model, budget)
            assert ours.decision.log_values == {"budget": budget}
            assert sum(sum(row) for row in kept.values()) == budget
            for site in SITES:
                their_row = kept[f"{site.name}.lora_E.default"]
                name = f"{site.name}.lora_lambda"
                our_row = ~ours.decision.zero[name] if step < END else ours.decision.live[name]
                assert our_row.tolist() == their_row
                assert ours.decision.components[site.name].open == sum(their_row)
        for site in SITES:
            torch.testing.assert_close(
                dict(model.named_parameters())[f"{site.name}.lora_E.default"].view(-1),
                ours.w[f"{site.name}.lora_lambda"],
                rtol=0,
                atol=1e-6,
            )
    assert decisions == 13


# --- budget, revival, freeze --------------------------------------------------------------------


def test_exactly_the_budget_is_open_after_every_decision_and_no_site_counts_what_it_has_not() -> (
    None
):
    ours = toy()
    for step in range(1, END + 1):
        ours.step(step)
        if ours.method.decides_at(step):
            budget = cubic_budget(step, begin=BEGIN, end=END, first=12, last=6)
            assert ours.num_open() == budget
            assert sum(p.open for p in ours.decision.components.values()) == budget
    assert ours.num_open() == 6


def test_a_zeroed_lambda_moves_again_and_can_be_kept_later() -> None:
    """Piece 0 has large gradients in the second half only; the last decision before is at 18."""
    ours, generator, shut = toy(), torch.Generator().manual_seed(3), []
    for step in range(1, END + 1):
        for name, w in ours.w.items():
            w.grad = torch.randn(w.shape, generator=generator)
            of_component_0 = w.grad[:, 0] if name.endswith("lora_b") else w.grad[0]
            of_component_0 *= 0.1 if step <= 18 else 10.0
        ours.observe(step)
        ours.update(step)
        shut += [step] if ours.w["first.lora_lambda"][0] == 0 else []
        if step == 19:
            assert ours.num_open() == 12, "between decisions every lambda moves"
    assert 18 in shut and max(shut) <= 21
    assert 0 in ours.decision.components["first"].computed


def test_after_the_freeze_what_is_gone_stays_zero_and_is_not_computed() -> None:
    ours = toy()
    for step in range(1, END + 1):
        ours.step(step)
    frozen = {site: components.computed for site, components in ours.decision.components.items()}
    for step in range(END + 1, TOTAL + 1):
        ours.step(step)
    for site, computed in frozen.items():
        gone = [i for i in range(RANK) if i not in computed]
        assert (ours.w[f"{site}.lora_lambda"][gone] == 0).all()
        assert (ours.w[f"{site}.lora_a"][gone] == 0).all()
        assert (ours.w[f"{site}.lora_b"][:, gone] == 0).all()
        assert (ours.w[f"{site}.lora_lambda"][list(computed)] != 0).all()
    assert ours.method.observes_until == END


def masks_of(ours: Toy) -> list[list[bool]]:
    masks = []
    for step in range(1, END + 1):
        ours.step(step)
        masks += [z.tolist() for z in (*ours.decision.zero.values(), *ours.decision.live.values())]
    return masks


def test_a_loss_eight_times_as_large_gives_the_same_masks() -> None:
    """A power of two, so that no rounding differs. It catches a loss scale left in the gradient."""
    plain = masks_of(toy())
    assert plain == masks_of(toy(loss_factor=8.0)) and any(not all(m) for m in plain)


def test_components_in_another_order_end_in_that_order() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    ours, other = toy(), toy()
    for name, w in other.w.items():
        w.data = ours.w[name].data.index_select(1 if name.endswith("lora_b") else 0, order)
    for step in range(1, END + 1):
        ours.step(step)
        other.step(step)
    for site in SITES:
        name = f"{site.name}.lora_lambda"
        torch.testing.assert_close(other.w[name], ours.w[name][order], rtol=1e-3, atol=1e-5)
        assert torch.equal(other.w[name] != 0, ours.w[name][order] != 0)


def test_the_budget_goes_to_the_site_with_the_larger_gradients() -> None:
    ours, generator = toy(), torch.Generator().manual_seed(4)
    for step in range(1, END + 1):
        for name, w in ours.w.items():
            w.grad = torch.randn(w.shape, generator=generator) * (3.0 if "second" in name else 1.0)
        ours.observe(step)
        ours.update(step)
    assert [ours.decision.components[site.name].open for site in SITES] == [0, 6]


# --- ties and corners ---------------------------------------------------------------------------


def test_of_equal_scores_the_lowest_index_of_the_first_site_stays() -> None:
    kept = top_components({"q": torch.ones(3), "k": torch.ones(3)}, 4)
    assert kept["q"].tolist() == [True] * 3 and kept["k"].tolist() == [True, False, False]


def test_a_site_may_end_without_a_component_and_adds_nothing() -> None:
    method = adalora(OPTIONS, context())
    shapes = {f"{s.name}.{n}": t.shape for s in SITES for n, t in method.form(s).tensors.items()}
    scores = WholeScores({n: torch.full(s, float("second" in n)) for n, s in shapes.items()})
    decision = method.decide(END, scores)
    assert decision.components["first"].computed == () and decision.components["first"].open == 0
    assert decision.components["second"].open == RANK
    empty = {"lora_a": torch.zeros(0, 10), "lora_b": torch.zeros(14, 0)}
    empty["lora_lambda"] = torch.zeros(0)
    assert torch.equal(
        method.form(SITES[0]).delta(torch.randn(4, 10), empty, SCALE), torch.zeros(4, 14)
    )
    assert method.penalty is not None
    assert {n: g.shape for n, g in method.penalty(empty).items()} == {
        "lora_a": (0, 10),
        "lora_b": (14, 0),
    }


def test_a_target_of_the_whole_rank_prunes_nothing() -> None:
    """Where the released allocator and PEFT's ask for the 0-th smallest score, and fail."""
    ours = toy(AdaLoraOptions(adalora_target_rank=RANK))
    for step in range(1, TOTAL + 1):
        ours.step(step)
    assert ours.num_open() == 12 and all(bool(mask.all()) for mask in ours.live.values())


def test_nothing_is_decided_while_every_score_is_zero() -> None:
    method = adalora(AdaLoraOptions(adalora_begin=0.0, adalora_every=1), context())
    assert min(s for s in range(TOTAL) if method.decides_at(s)) == 2


def test_decisions_come_at_their_pace_and_at_the_freeze() -> None:
    method = adalora(OPTIONS, context())
    assert [s for s in range(END + 1) if method.decides_at(s)] == [*range(6, 40, 3), 40]
    thousand = adalora(AdaLoraOptions(), context(1000))
    assert [s for s in range(801) if thousand.decides_at(s)] == [*range(110, 800, 10), 800]
    assert (method.observes_until, thousand.observes_until) == (END, 800)


def test_a_component_scores_by_lambda_and_the_means_of_its_row_and_column() -> None:
    site = {"lora_a": torch.full((2, 10), 3.0), "lora_b": torch.full((14, 2), 5.0)}
    site["lora_a"][1] = 4.0
    site["lora_lambda"] = torch.tensor([1.0, 2.0])
    scores = triplet_scores(WholeScores({f"q.{name}": t for name, t in site.items()}))
    assert scores["q"].tolist() == [9.0, 11.0]


def test_the_delta_starts_at_nothing() -> None:
    method = adalora(OPTIONS, context())
    w = {n.partition(".")[2]: t for n, t in first_values(method).items() if n.startswith("first")}
    assert torch.equal(
        method.form(SITES[0]).delta(torch.randn(4, 10), w, SCALE), torch.zeros(4, 14)
    )
    assert (w["lora_a"] != 0).all() and (w["lora_b"] != 0).all()


def orthogonality(preset: str, w: dict[str, Tensor]) -> Tensor:
    grams = [
        (m.t() @ m if name.endswith("lora_b") else m @ m.t()) - torch.eye(RANK)
        for name, m in w.items()
        if not name.endswith("lambda")
    ]
    if preset == "paper":
        return 0.3 * torch.stack([g.square().sum() for g in grams]).sum()
    return 0.3 * torch.stack([g.norm() for g in grams]).mean()


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_penalty_of_a_preset_is_the_gradient_of_its_norms(preset: str) -> None:
    options = AdaLoraOptions(adalora_preset=preset, adalora_orthogonality=0.3)  # type: ignore[arg-type]
    method = adalora(options, context())
    w = {name: t.requires_grad_() for name, t in first_values(method).items()}
    orthogonality(preset, w).backward()
    assert method.penalty is not None
    for site in SITES:
        own = {n.partition(".")[2]: t for n, t in w.items() if n.startswith(f"{site.name}.")}
        with torch.no_grad():
            gradients = method.penalty(own)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, own[name].grad, rtol=1e-4, atol=1e-7)
    assert adalora(AdaLoraOptions(adalora_orthogonality=0.0), context()).penalty is None


# --- options ------------------------------------------------------------------------------------


def test_bad_options_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        AdaLoraOptions(
            adalora_target_rank=0.5,
            adalora_begin=0.5,
            adalora_final=0.5,
            adalora_lambda_lr_factor=0.0,
            adalora_every=0,
            adalora_beta1=1.0,
            adalora_beta2=-0.1,
            adalora_orthogonality=-1.0,
        )
    names = ("target_rank", "begin", "lambda_lr_factor", "every", "beta1", "beta2", "orthogonality")
    assert all(f"adalora_{name} " in str(error.value) for name in names)


def test_a_budget_above_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="asks for 14 components, but all linears .* have 12"):
        adalora(AdaLoraOptions(adalora_target_rank=7), context())


def test_a_run_too_short_to_prune_in_is_refused() -> None:
    with pytest.raises(ValueError, match="of 1, which leaves no step .* Raise --max_steps"):
        adalora(AdaLoraOptions(), context(1))


def test_two_thirds_of_the_rank_stay_by_default() -> None:
    method = adalora(AdaLoraOptions(), context())
    scores = toy().scores()
    assert method.decide(END, scores).log_values == {"budget": 8}
