"""What a run does that its options may not lead one to expect is said once."""

import pytest

from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.train import seldom_both


@pytest.mark.parametrize(
    ("eval_every", "save_every", "met"),
    [(2, 3, 6), (50, 100, None), (4, 2, None), (0, 3, None), (3, 0, None), (4, 6, 12)],
)
def test_a_best_checkpoint_that_is_seldom_saved_is_pointed_out(
    eval_every: int, save_every: int, met: int | None
) -> None:
    """huggingface/transformers#24614 refuses such steps."""
    every = {"eval_every": eval_every, "save_every": save_every}
    notes = seldom_both(RunConfig(**every, keep_last=1))
    assert [f"meet every {met} steps" in note for note in notes] == [True] * (met is not None)
    assert seldom_both(RunConfig(**every)) == []
    assert seldom_both(RunConfig(**every, keep_last=1, keep_best=False)) == []
