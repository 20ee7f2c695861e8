"""What a run does that its options may not lead one to expect is said once."""

import pytest

from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.train import of_evaluations


@pytest.mark.parametrize(
    ("eval_every", "save_every", "met"),
    [(2, 3, 6), (50, 100, None), (4, 2, None), (0, 3, None), (3, 0, None), (4, 6, 12)],
)
def test_a_best_checkpoint_that_is_seldom_saved_is_pointed_out(
    eval_every: int, save_every: int, met: int | None
) -> None:
    """huggingface/transformers#24614 refuses such steps."""
    every = {"eval_every": eval_every, "save_every": save_every}
    notes = of_evaluations(RunConfig(**every, keep_last=1), held_out=True)
    assert [f"meet every {met} steps" in note for note in notes] == [True] * (met is not None)
    assert of_evaluations(RunConfig(**every), held_out=True) == []
    assert of_evaluations(RunConfig(**every, keep_last=1, keep_best=False), held_out=True) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_every": 10}, "--eval_every without effect"),
        ({"eval_every": 10, "eval_batches": 3}, "--eval_every and --eval_batches without effect"),
        ({"eval_every": 0, "save_every": 30, "keep_last": 1}, None),
        ({}, None),
    ],
)
def test_evaluations_without_held_out_data_are_pointed_out(
    given: dict[str, int], said: str | None
) -> None:
    notes = of_evaluations(RunConfig(**given), held_out=False)
    assert [note.startswith(f"{said}: there are no held-out data") for note in notes] == (
        [] if said is None else [True]
    )
