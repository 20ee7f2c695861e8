"""MELoRA: blocks on the diagonal and nothing beside them, of a rank that adds up."""

from dataclasses import replace

import pytest
import torch

from sparse_lora_dist.methods.melora import MeLoraOptions, melora
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import RunContext

SITE = Site(name="q", in_features=24, out_features=36, rank=2)


def context(*sites: Site) -> RunContext:
    return RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=sites)


@pytest.mark.parametrize("ranks", [(), (1, 3, 2, 2)])
def test_the_change_is_blocks_of_their_own_rank_and_scale(ranks: tuple[int, ...]) -> None:
    form = melora(MeLoraOptions(melora_blocks=4, melora_ranks=ranks), context(SITE)).form(SITE)
    tensors = {name: torch.randn(spec.shape) for name, spec in form.tensors.items()}
    alpha = 8.0
    change_OI = form.delta(torch.eye(24), tensors, alpha / SITE.rank).t()
    mask = torch.block_diag(*[torch.ones(9, 6)] * 4).bool()
    assert not change_OI[~mask].any()
    of_all = ranks or (2, 2, 2, 2)
    assert torch.linalg.matrix_rank(change_OI) == sum(of_all)
    first_a, first_b = tensors["lora_a"][: of_all[0]], tensors["lora_b"][:, : of_all[0]]
    torch.testing.assert_close(change_OI[:9, :6], alpha / of_all[0] * first_b @ first_a)
    a_RI, b_OR = form.to_lora(tensors)
    assert a_RI.shape == (sum(of_all), 24)
    torch.testing.assert_close(alpha / SITE.rank * b_OR @ a_RI, change_OI)


@pytest.mark.parametrize(("out", "wide"), [(768, 768), (3072, 768), (4096, 4096), (11008, 4096)])
def test_parameters_are_those_of_lora(out: int, wide: int) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    form = melora(MeLoraOptions(melora_blocks=4), context(site)).form(site)
    count = sum(torch.Size(spec.shape).numel() for spec in form.tensors.values())
    assert count == 8 * (out + wide)


def test_sides_that_do_not_divide_are_refused_with_the_nearest_that_does() -> None:
    wide, other = replace(SITE, out_features=48), replace(SITE, name="up", out_features=60)
    with pytest.raises(ValueError, match="melora_blocks 8 does not .* up, which is 60 x 24"):
        melora(MeLoraOptions(melora_blocks=8), context(wide, other))
    with pytest.raises(ValueError, match="nearest number that divides those of every linear is 4"):
        melora(MeLoraOptions(melora_blocks=5), context(SITE, wide))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"melora_blocks": 0}, "melora_blocks must be at least 1, got 0"),
        ({"melora_ranks": (1, 2, 3)}, "melora_ranks must be 2 numbers"),
        ({"melora_ranks": (1, 0)}, "melora_ranks must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MeLoraOptions(**options)  # type: ignore[arg-type]
