"""An attention kernel that no training uses, and more ranks than can be counted."""

import pytest

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.distributed.launch import MOST_RANKS, find_launch
from sparse_lora_dist.errors import ConfigError, UserError

BY_HAND = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29537"}


@pytest.mark.parametrize("kernel", ["flex_attention", "paged|eager", "paged|flash_attention_2"])
def test_a_kernel_that_cannot_train_is_refused_before_anything_is_loaded(kernel: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--attn_implementation", kernel])
    said = str(caught.value)
    assert kernel in said and "Give varlen, eager, sdpa, a flash_attention_..." in said


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_attention_2", "kernels-org/kernel"])
def test_other_kernels_are_left_to_transformers(kernel: str) -> None:
    flags = ["--attn_implementation", kernel, "--micro_batch_size", "1"]
    assert load_config(flags).model.attn_implementation == kernel


@pytest.mark.parametrize("size", [MOST_RANKS + 1, 2**31, 3_000_000_000, 10**17])
def test_more_ranks_than_a_run_can_have_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"^WORLD_SIZE={size} is more than the 1,000,000 ranks"):
        find_launch(BY_HAND | {"WORLD_SIZE": str(size)})


def test_a_rank_beyond_the_ranks_is_refused_whatever_its_size() -> None:
    with pytest.raises(UserError, match="RANK=3000000000 contradicts WORLD_SIZE=2"):
        find_launch(BY_HAND | {"WORLD_SIZE": "2", "RANK": "3000000000"})
