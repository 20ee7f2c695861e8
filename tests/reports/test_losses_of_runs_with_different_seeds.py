"""Held-out losses of runs that were started with different seeds, or by an earlier version."""

from pathlib import Path

import numpy as np

from sparse_lora_dist.checkpoint.manifest import read_manifest
from sparse_lora_dist.data import pack, packed_batch
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.training.feed import DataFeed, with_held_out_of
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun


class Lengths:
    """As much of ``Documents`` as packing asks for."""

    lengths = np.arange(1, 31)

    def __len__(self) -> int:
        return len(self.lengths)


def test_the_seed_does_not_choose_the_held_out_rows_of_a_partial_evaluation(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """At step 0 the model is the base alone, so equal rows have equal losses."""
    part = {"max_steps": 1, "eval_batches": 1, "micro_batch_size": 1, "method": "lora"}
    first = []
    for seed in (0, 1, 2):
        flags = tiny.flags(tmp_path / str(seed), seed=seed, **part)
        said = ranks(1, "tests.work.run:train", flags=flags)[0]
        assert "held-out scores are those of the first 1 of" in said
        first.append(read_records(tmp_path / str(seed) / "metrics.jsonl")[0]["held_out_loss"])
    assert first == [first[0]] * 3


def test_a_resumed_run_scores_the_held_out_rows_of_its_checkpoint(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """A checkpoint of before has no held_out_seed: its rows were packed by the seed of the run."""
    flags = tiny.flags(tmp_path, max_steps=2, stop_after=1, seed=1)
    ranks(1, "tests.work.run:train", flags=flags)
    manifest = read_manifest(tmp_path / "checkpoints" / "step_00000001")
    assert manifest.pop("held_out_seed") == 0

    documents = Lengths()
    options = {"sequence_length": 64, "packing": True}
    rows = pack(documents, **options, seed=0)
    numbers = {"pad_id": 0, "micro_batch_size": 1, "accumulation": 1, "end_row": 1}
    feed = DataFeed(rows=rows, held_out=rows, collate=packed_batch, **numbers)
    before = pack(documents, **options, seed=1)
    found = with_held_out_of(feed, manifest, packing=True).held_out
    assert [found.document_numbers(i) for i in range(len(found))] == [
        before.document_numbers(i) for i in range(len(before))
    ]
    for seed in (0, None):  # packed as today; no held-out data
        assert with_held_out_of(feed, manifest | {"held_out_seed": seed}, packing=True) is feed
