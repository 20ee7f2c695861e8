"""PRILoRA: the ramp adds up, and what is pruned is what little of the input reaches."""

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.base import Method, Plan
from sparse_lora_dist.methods.form import Site
from sparse_lora_dist.methods.prilora import PriloraOptions, depths_of, prilora, ramp
from sparse_lora_dist.methods.rewriting import Rewritten, Whole


def sites(layers: int, rank: int = 8) -> tuple[Site, ...]:
    return tuple(
        Site(name=f"model.layers.{i}.{leaf}", in_features=12, out_features=10, rank=rank)
        for i in range(layers)
        for leaf in ("q_proj", "v_proj")
    )


def method_of(layers: int = 2, steps: int = 100, rank: int = 8, **options: object) -> Method:
    plan = Plan(total_steps=steps, warmup_steps=0, learning_rate=1e-3, sites=sites(layers, rank))
    return prilora(PriloraOptions(**options), plan)  # type: ignore[arg-type]


def written(a_RI: Tensor, squares_I: Tensor | None, sparsity: float = 0.5) -> Rewritten:
    rewriting = method_of(prilora_sparsity=sparsity).rewriting
    assert rewriting is not None
    return rewriting.write(
        Whole(
            site=sites(1)[0],
            index=0,
            step=40,
            tensors={"lora_a": a_RI},
            scale=1.0,
            weight_OI=lambda: torch.zeros(10, 12),
            generator=torch.Generator(),
            squares_I=squares_I,
        )
    )


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12, 80])
@pytest.mark.parametrize(("mean", "first"), [(8, 4), (8, None), (8, 15), (8, 8), (1, 1), (5, 2)])
def test_ranks_add_up_to_the_mean_times_the_layers(
    layers: int, mean: int, first: int | None
) -> None:
    ranks = ramp(layers, mean, first)
    assert len(ranks) == layers and sum(ranks) == mean * layers and min(ranks) >= 1
    start = max(1, mean // 2) if first is None else first
    for i, rank in enumerate(ranks if layers > 1 else []):
        assert abs(rank - (start + 2 * (mean - start) * i / (layers - 1))) <= 1.0


def test_twelve_layers_go_from_4_to_12() -> None:
    ranks = ramp(12, 8, 4)
    assert (ranks[0], ranks[-1]) == (4, 12) and ranks == sorted(ranks)


def test_a_layer_is_the_first_number_of_a_name() -> None:
    names = {site.name: depth for site, depth in zip(sites(2), (0, 0, 1, 1), strict=True)}
    assert depths_of(sites(2)) == names
    shapes = [method_of(rank=2).form(site).tensors["lora_a"].shape for site in sites(2, rank=2)]
    assert shapes == [(1, 12), (1, 12), (3, 12), (3, 12)]
    plain = tuple(Site(name=n, in_features=2, out_features=2, rank=2) for n in ("q", "k", "up"))
    assert depths_of(plain) == {"q": 0, "k": 1, "up": 2}


def test_half_of_each_row_goes_by_weight_times_input() -> None:
    a_RI = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    squares_I = torch.rand(12, generator=torch.Generator().manual_seed(1)).double() ** 4
    made = written(a_RI, squares_I)
    after_RI = made.tensors["lora_a"]
    scores_RI = a_RI.abs() * squares_I.sqrt()
    for row, scores, after in zip(a_RI, scores_RI, after_RI, strict=True):
        gone = set(sorted(range(12), key=lambda i: float(scores[i]))[:6])
        assert {i for i in range(12) if after[i] == 0} == gone
        assert all(after[i] == row[i] for i in range(12) if i not in gone)
    assert made.facts == {"zeros_in_a": 0.5}
    # A small entry survives where much comes in, a large one dies where nothing does.
    a_RI, squares_I = torch.tensor([[0.01, 1.0, 0.5, 0.4]]), torch.tensor([1e6, 0.0, 1.0, 1.0])
    assert written(a_RI, squares_I.double()).tensors["lora_a"].tolist() == [
        pytest.approx([0.01, 0.0, 0.5, 0.0])
    ]


def test_of_equal_ones_the_first_go_and_without_inputs_seen_weights_decide() -> None:
    assert written(torch.ones(1, 4), None).tensors["lora_a"].tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_what_was_zeroed_may_come_back() -> None:
    """Nothing is taken from the living, and no moment is touched."""
    method = method_of()
    assert method.rewriting is not None and not method.rewriting.resets_moments
    assert [s for s in range(101) if method.rewriting.at(s)] == list(range(10, 101, 10))
    a_RI = written(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), None).tensors["lora_a"].clone()
    a_RI[0, 0] = 9.0
    assert written(a_RI, None).tensors["lora_a"].tolist() == [[9.0, 0.0, 0.0, 4.0]]


def test_the_trainable_count_is_loras() -> None:
    for out, inner in ((768, 768), (3072, 768), (4096, 4096), (11008, 4096)):
        layers = tuple(
            Site(name=f"layers.{i}.q", in_features=inner, out_features=out, rank=8)
            for i in range(12)
        )
        plan = Plan(total_steps=100, warmup_steps=0, learning_rate=1e-3, sites=layers)
        form = prilora(PriloraOptions(), plan).form
        numel = (torch.Size(s.shape).numel() for x in layers for s in form(x).tensors.values())
        assert sum(numel) == 12 * 8 * (inner + out)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="first 16 and a mean of --rank 8 leave 0.*most 15"):
        method_of(prilora_first=16)
    with pytest.raises(ValueError, match="sparsity must.*; prilora_decay must.*; prilora_first"):
        PriloraOptions(prilora_sparsity=1.0, prilora_decay=-1.0, prilora_first=0)
