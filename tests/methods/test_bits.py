"""Masks a bit an entry: what is packed is what is unpacked, in an eighth of the bytes."""

import pytest
import torch

from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.shared.bit_masks import mask_spec, pack, unpack

SHAPES = ((1, 1), (1, 8), (3, 5), (8, 8), (28, 40), (13, 11))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_comes_back_from_as_many_bytes_as_are_kept(shape: tuple[int, int]) -> None:
    site = Site(name="q", out_features=shape[0], in_features=shape[1], rank=1)
    mask_OI = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    for mask in (mask_OI, ~mask_OI, torch.zeros_like(mask_OI), torch.ones_like(mask_OI)):
        bits_B, spec = pack(mask), mask_spec(site)
        assert (bits_B.shape, bits_B.dtype) == (spec.shape, spec.dtype)
        assert torch.equal(unpack(bits_B, shape), mask)
    assert torch.equal(unpack(pack(mask_OI.t()), shape[::-1]), mask_OI.t())  # not contiguous
    assert mask_spec(site).num_bytes == -(-shape[0] * shape[1] // 8)


def test_entries_go_row_by_row_from_the_lowest_bit() -> None:
    mask_OI = torch.zeros(2, 5, dtype=torch.bool)
    mask_OI[0, 0] = mask_OI[0, 3] = mask_OI[1, 4] = True
    assert pack(mask_OI).tolist() == [0b1001, 0b10]


def test_what_was_never_written_is_no_entry() -> None:
    spec = mask_spec(Site(name="q", out_features=13, in_features=11, rank=1))
    assert not unpack(torch.zeros(spec.shape, dtype=spec.dtype), (13, 11)).any()


def test_shapes_alone_are_enough() -> None:
    bits_B = pack(torch.empty(13, 11, dtype=torch.bool, device="meta"))
    assert unpack(bits_B, (13, 11)).shape == (13, 11) and bits_B.shape == (18,)
