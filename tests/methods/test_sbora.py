"""SBoRA: only the chosen columns, or rows, of the weight change, and as many parameters train."""

import pytest
import torch

from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import RunContext
from sparse_lora_dist.methods.sbora import SBoraOptions, sbora

SITE = Site(name="q", in_features=40, out_features=28, rank=6)
COUNTS = {(768, 768): (6144, 6144), (3072, 768): (24576, 6144), (11008, 4096): (88064, 32768)}
"""(O, I) -> what FA and FB train at rank 8."""


def context(*sites: Site) -> RunContext:
    return RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=sites)


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_only_the_chosen_lines_of_the_weight_change(side: str) -> None:
    form = sbora(SBoraOptions(sbora_side=side), context(SITE)).form(SITE)  # type: ignore[arg-type]
    ((name, spec),) = form.tensors.items()
    tensors = form.drawn(5, torch.device("cpu")) | {name: torch.randn(spec.shape)}
    change_OI = form.delta(torch.eye(40), tensors, 2.0).t()
    touched = change_OI.any(dim=0 if side == "fa" else 1).nonzero().flatten()
    assert touched.tolist() == tensors["chosen"].tolist() and len(touched) == 6
    a_RI, b_OR = form.to_lora(tensors)
    torch.testing.assert_close(2.0 * b_OR @ a_RI, change_OI)


@pytest.mark.parametrize("shape", COUNTS)
def test_parameters_are_as_the_paper_counts_them(shape: tuple[int, int]) -> None:
    site = Site(name="q", in_features=shape[1], out_features=shape[0], rank=8)
    for side, count in zip(("fa", "fb"), COUNTS[shape], strict=True):
        form = sbora(SBoraOptions(sbora_side=side), context(site)).form(site)  # type: ignore[arg-type]
        assert sum(torch.Size(s.shape).numel() for s in form.tensors.values()) == count


def test_more_than_there_are_is_refused() -> None:
    narrow = Site(name="k", in_features=40, out_features=4, rank=6)
    sbora(SBoraOptions(), context(SITE, narrow))
    with pytest.raises(
        ValueError, match="k is 4 x 40. --rank 6 is more than its 4 rows. .* --rank 4"
    ):
        sbora(SBoraOptions(sbora_side="fb"), context(SITE, narrow))
