"""What trains of a linear at rank 8, by each method's own form, against numbers worked out by hand
from the papers' shapes."""

from math import prod
from typing import Any

import pytest
import torch

from sparse_lora_dist.methods import METHODS, RunContext
from sparse_lora_dist.methods.protocol.form import Site
from tests.fixtures.whole_scores import WholeScores

SHAPES = ((768, 768), (3072, 768), (4096, 4096), (11008, 4096))
"""(O, I)"""
COUNTS: dict[tuple[str, str], tuple[int, int, int, int]] = {
    ("lora", ""): (12_288, 30_720, 65_536, 120_832),
    ("sora", ""): (12_296, 30_728, 65_544, 120_840),
    ("adalora", ""): (12_296, 30_728, 65_544, 120_840),
    ("increlora", ""): (12_296, 30_728, 65_544, 120_840),
    ("sbora", "sbora_side=fa"): (6_144, 24_576, 32_768, 88_064),
    ("sbora", "sbora_side=fb"): (6_144, 6_144, 32_768, 32_768),
    ("melora", "melora_blocks=4"): (12_288, 30_720, 65_536, 120_832),
    ("mora", "mora_type=1"): (12_321, 30_625, 65_536, 121_104),
    ("mora", "mora_type=6"): (12_100, 30_276, 65_536, 121_104),
    ("neat", ""): (12_288, 12_288, 65_536, 65_536),
    ("neat", "neat_form=peft"): (12_288, 49_152, 65_536, 176_128),
    ("shira", ""): (12_288, 30_720, 65_536, 120_832),
    ("shira", "shira_density=0.01"): (5_898, 23_592, 167_772, 450_887),
}


def count(name: str, option: str, out: int, inner: int) -> int:
    """Entries of all tensors that train."""
    site = Site(name="layers.0.q", in_features=inner, out_features=out, rank=8)
    context = RunContext(total_steps=100, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    key, _, value = option.partition("=")
    given: dict[str, Any] = {key: value} if key else {}
    if value.replace(".", "").isdigit():
        given[key] = float(value) if "." in value else int(value)
    factory = METHODS[name]
    form = factory.build(factory.options(**given), context).form(site)
    return sum(prod(spec.shape) for spec in form.tensors.values())


@pytest.mark.parametrize(("name", "option"), COUNTS, ids=" ".join)
def test_counts_at_rank_8(name: str, option: str) -> None:
    counted = tuple(count(name, option, *shape) for shape in SHAPES)
    assert counted == COUNTS[name, option]


@pytest.mark.parametrize(("shape", "left"), zip(SHAPES, (608, 1_528, 3_264, 6_032), strict=True))
def test_roselora_leaves_a_twentieth_of_each_row_and_column(
    shape: tuple[int, int], left: int
) -> None:
    site = Site(name="q", in_features=shape[1], out_features=shape[0], rank=8)
    context = RunContext(total_steps=100, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    options = METHODS["roselora"].options(roselora_keep=0.05)
    method = METHODS["roselora"].build(options, context)
    last = max(step for step in range(101) if method.decides_at(step))
    generator = torch.Generator().manual_seed(0)
    scores = {
        f"q.{key}": torch.rand(spec.shape, generator=generator)
        for key, spec in method.form(site).tensors.items()
    }
    live = method.decide(last, WholeScores(scores)).live
    assert sum(int(mask.sum()) for mask in live.values()) == left
