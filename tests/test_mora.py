"""MoRA: its update is the matrix that the paper's maps make, of as many parameters as LoRA has."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.base import Plan
from sparse_lora_dist.methods.form import Form, Site
from sparse_lora_dist.methods.mora import MoraOptions, mora

SITE = Site(name="q", in_features=24, out_features=36, rank=2)
SITES = [SITE, replace(SITE, out_features=17), replace(SITE, in_features=5, out_features=90)]


def form_of(site: Site, kind: int) -> Form:
    plan = Plan(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    return mora(MoraOptions(mora_type=kind), plan).form(site)  # type: ignore[arg-type]


def change(site: Site, kind: int) -> tuple[Tensor, Tensor]:
    """M and what is added to the weight."""
    form = form_of(site, kind)
    m_HH = torch.randn(form.tensors["mora_m"].shape, dtype=torch.float64)
    eye = torch.eye(site.in_features, dtype=torch.float64)
    return m_HH, form.delta(eye, {"mora_m": m_HH}, 1.0).t()


@pytest.mark.parametrize("site", SITES)
def test_type_1_shares_the_matrix_over_groups(site: Site) -> None:
    m_HH, change_OI = change(site, 1)
    side, wanted = len(m_HH), torch.zeros_like(change_OI)
    for o in range(site.out_features):
        for place in range(math.ceil(site.in_features / side) * side):
            wanted[o, place % site.in_features] += m_HH[o % side, place % side]
    torch.testing.assert_close(change_OI, wanted)


@pytest.mark.parametrize("site", SITES)
def test_type_6_turns_each_group_by_its_angle(site: Site) -> None:
    m_HH, change_OI = change(site, 6)
    side, groups = len(m_HH), math.ceil(site.in_features / len(m_HH))
    assert side % 2 == 0
    whole = torch.zeros(groups * side, site.in_features, dtype=torch.float64)
    for g in range(groups):
        turn = torch.zeros(side, side, dtype=torch.float64)
        for j in range(side // 2):
            angle, k = g * 10000.0 ** (-2 * j / side), j + side // 2
            turn[j, j] = turn[k, k] = math.cos(angle)
            turn[j, k], turn[k, j] = -math.sin(angle), math.sin(angle)
        for h in range(side):
            column = (g * side + h) % site.in_features
            whole[g * side : (g + 1) * side, column] += (m_HH @ turn)[:, h]
    wanted = whole[torch.arange(site.out_features) % len(whole)]
    torch.testing.assert_close(change_OI, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("out", "wide", "one", "six"),
    [(768, 768, 111, 110), (3072, 768, 175, 174), (4096, 4096, 256, 256), (11008, 4096, 348, 348)],
)
def test_parameters_are_a_square(out: int, wide: int, one: int, six: int) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    for kind, side in ((1, one), (6, six)):
        assert form_of(site, kind).tensors["mora_m"].shape == (side, side)
