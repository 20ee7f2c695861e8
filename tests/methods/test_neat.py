"""NEAT: a network of the base weight, without ever making the delta, and PEFT's own form of it."""

import peft
import pytest
import torch
from torch import Tensor, nn

from sparse_lora_dist.methods.neat import NeatOptions, neat
from sparse_lora_dist.methods.protocol.form import WEIGHT, Form, Site
from sparse_lora_dist.methods.protocol.method import RunContext

SITE = Site(name="q", in_features=20, out_features=14, rank=4)


def form_of(site: Site = SITE, form: str = "official", depth: int = 0) -> Form:
    context = RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    options = NeatOptions(neat_form=form, neat_depth=depth)  # type: ignore[arg-type]
    return neat(options, context).form(site)


def random_tensors(form: Form) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {WEIGHT: (14, 20)} | {name: spec.shape for name, spec in form.tensors.items()}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_official_form_is_a_network_of_the_weights_rows(depth: int) -> None:
    form = form_of(depth=depth)
    tensors = random_tensors(form)
    h_OR = torch.relu(tensors[WEIGHT] @ tensors["neat_a"].t())
    for k in range(depth):
        h_OR = torch.relu(h_OR @ tensors[f"neat_m{k}"].t())
    wanted_OI = 2.0 * h_OR @ tensors["neat_b"]
    change_OI = form.delta(torch.eye(20, dtype=torch.float64), tensors, 2.0).t()
    torch.testing.assert_close(change_OI, wanted_OI)
    assert form.to_lora is not None
    a_RI, b_OR = form.to_lora(tensors)
    torch.testing.assert_close(2.0 * b_OR @ a_RI, wanted_OI)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_other_form_is_what_peft_computes(depth: int) -> None:
    form = form_of(form="peft", depth=depth)
    tensors = random_tensors(form)
    assert form.to_peft is not None
    said = form.to_peft(tensors, 0.5)
    model = nn.Sequential(nn.Linear(20, 14, bias=False).double())
    model[0].weight.data = tensors[WEIGHT]
    theirs = peft.get_peft_model(model, peft.PeanutConfig(target_modules=["0"], **said.config))
    layer = theirs.base_model.model[0].double()
    saved = {
        name.replace(".default", ""): parameter
        for name, parameter in layer.named_parameters()
        if "peanut" in name
    }
    assert saved.keys() == said.tensors.keys()
    for name, parameter in saved.items():
        parameter.data = said.tensors[name]
    change_OI = form.delta(torch.eye(20, dtype=torch.float64), tensors, 0.5).t()
    torch.testing.assert_close(layer.get_delta_weight("default"), change_OI)


@pytest.mark.parametrize(
    ("out", "inner", "count", "as_peft"),
    [
        (768, 768, 12_288, 12_288),
        (3072, 768, 12_288, 49_152),
        (4096, 4096, 65_536, 65_536),
        (11008, 4096, 65_536, 176_128),
    ],
)
def test_counts_at_rank_8(out: int, inner: int, count: int, as_peft: int) -> None:
    site = Site(name="q", in_features=inner, out_features=out, rank=8)
    for form, wanted in (("official", count), ("peft", as_peft)):
        specs = form_of(site, form).tensors.values()
        assert sum(torch.Size(spec.shape).numel() for spec in specs) == wanted
    deeper = [torch.Size(s.shape).numel() for s in form_of(site, depth=2).tensors.values()]
    assert sum(deeper) == count + 2 * 8 * 8


def test_a_depth_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="neat_depth must be at least 0, got -1"):
        NeatOptions(neat_depth=-1)
