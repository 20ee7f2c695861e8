"""Ranges of a checkpoint's tensors, wherever files and bytes of bits were cut."""

import json
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.checkpoint.save import _one_if_all_equal
from sparse_lora_dist.methods.shared.bit_masks import pack_bits

SIZE = 61


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, SIZE), max_size=3),
    ends=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    births=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_any_range_is_what_was_saved(
    tmp_path_factory: object,
    cuts: list[int],
    ends: tuple[int, int],
    share: float,
    births: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(SIZE, generator=generator) < share
    whole = {
        "master": torch.randn(SIZE, generator=generator),
        "live": live,
        "exp_avg": torch.randn(SIZE, generator=generator) * live,
        "born": (7 + torch.randint(births, (SIZE,), generator=generator)).int() * live,
    }
    folder: Path = tmp_path_factory.mktemp("saved")  # type: ignore[attr-defined]
    edges = [0, *sorted(cuts), SIZE]
    names = [f"rank_{i}.safetensors" for i in range(len(edges) - 1)]
    for name, start, end in zip(names, edges[:-1], edges[1:], strict=True):
        part = {key: t[start:end].clone() for key, t in whole.items()}
        own = {
            "master/w": part["master"],
            "live/w": pack_bits(part["live"]),
            "exp_avg/w": part["exp_avg"][part["live"]],
            "born/w": _one_if_all_equal(part["born"][part["live"]]),
        }
        offsets = {"offsets": json.dumps({"w": [start, end - start]})}
        save_file(own, folder / name, metadata=offsets)
    first, last = min(ends), max(ends)
    slices = SavedSlices(folder, names)
    for key, values in whole.items():
        assert slices.entries(key, "w", first, last).equal(values[first:last]), key
