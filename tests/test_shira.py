"""SHiRA: as many entries as were asked for train, at places that stay, with their own gradient."""

import pytest
import torch

from sparse_lora_dist.methods import shira as module
from sparse_lora_dist.methods.base import Plan
from sparse_lora_dist.methods.form import Form, Site
from sparse_lora_dist.methods.shira import ShiraOptions, shira

SITE = Site(name="q", in_features=40, out_features=28, rank=3)
CPU = torch.device("cpu")


def form_of(site: Site = SITE, density: float | None = None) -> Form:
    plan = Plan(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    return shira(ShiraOptions(shira_density=density), plan).form(site)


def test_only_the_chosen_entries_change() -> None:
    form = form_of()
    drawn = form.drawn(7, CPU)
    values_N = torch.randn(form.tensors["shira_values"].shape)
    change_OI = form.delta(torch.eye(40), drawn | {"shira_values": values_N}, 1.0).t()
    places_N = drawn["shira_places"]
    assert torch.equal(change_OI.flatten()[places_N], values_N)
    assert int(change_OI.count_nonzero()) == len(values_N) == 3 * (28 + 40)
    assert torch.equal(places_N, form.drawn(7, CPU)["shira_places"])
    assert not torch.equal(places_N, form.drawn(8, CPU)["shira_places"])
    # Everywhere: rows and columns alike have some.
    assert change_OI.any(0).all() and change_OI.any(1).all()


@pytest.mark.parametrize("chunk", [2**24, 50])
def test_the_gradient_is_that_of_the_whole_weight_at_the_places(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    form = form_of()
    tensors = form.drawn(7, CPU)
    values_N = torch.randn(form.tensors["shira_values"].shape, dtype=torch.float64)
    x = torch.randn(2, 5, 40, dtype=torch.float64)
    weight_OI = torch.zeros(28 * 40, dtype=torch.float64)
    weight_OI[tensors["shira_places"]] = values_N
    weight_OI = weight_OI.view(28, 40).requires_grad_()
    for leaf in (values_N, x):
        leaf.requires_grad_()
    y, wanted = form.delta(x, tensors | {"shira_values": values_N}, 1.0), x @ weight_OI.t()
    torch.testing.assert_close(y, wanted)
    above = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, values_N], above)
    theirs = torch.autograd.grad(wanted, [x, weight_OI], above)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1].flatten()[tensors["shira_places"]])


@pytest.mark.parametrize(
    ("out", "wide", "count"),
    [(768, 768, 5898), (3072, 768, 23592), (4096, 4096, 167772), (11008, 4096, 450887)],
)
def test_parameters_are_a_share_of_the_weight_or_those_of_lora(
    out: int, wide: int, count: int
) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    assert form_of(site, 0.01).tensors["shira_values"].shape == (count,)
    assert form_of(site).tensors["shira_values"].shape == (8 * (out + wide),)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="shira_density must be in"):
        ShiraOptions(shira_density=1.5)
    small = Site(name="k", in_features=10, out_features=10, rank=6)
    with pytest.raises(ValueError, match="k is 10 x 10: --rank 6 makes 120 .* take 5"):
        form_of(small)
