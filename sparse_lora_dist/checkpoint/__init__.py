"""Write and read sharded checkpoints of all training state.

A checkpoint gets its final folder name only when all its files are on disk; then it is published.
It contains neither pickles nor weights of the base.

    checkpoints/step_00000100/
        rank_00000.safetensors ...   one rank's slice of every trained tensor; the file's metadata
                                     holds the range of entries of each slice
        manifest.json                written last, with the hash of every file; a folder without
                                     one is not a checkpoint
    checkpoints/latest               text file with the name of the newest checkpoint, for people

A rank's slice of a trained tensor "t" is stored under these keys:

    master/t                  fp32 master values
    live/t                    mask of live entries (those the optimizer steps), one bit per entry
    stat0/t ...               importance statistics of the sparse method, fp32, one per entry
    exp_avg/t, exp_avg_sq/t   moments, fp32, live entries only
    born/t                    birth steps (number of steps done when an entry became live), int32,
                              live entries only; a single value if all are equal

A rank's file also has these keys:

    kept/t                    bytes of a kept tensor, which a method writes and no gradient trains
    squares/s                 running mean of the squared inputs of "s", the name of a linear with
                              an adapter, float64
    rng/cpu, rng/cuda         states of the random generators

The manifest holds what is the same on every rank: the rank-1 components that each adapter computes,
and the statistics that the method keeps for each adapter as a whole. A rank reads the ranges that
it needs from the files that hold them, so a checkpoint can be read by any number of ranks.
"""

from sparse_lora_dist.checkpoint.manifest import (
    Progress,
    check_description,
    check_tensors,
    read_manifest,
    step_of,
)
from sparse_lora_dist.checkpoint.own_files import clean, set_aside
from sparse_lora_dist.checkpoint.recover import (
    find_damage,
    newest_whole,
    published,
    published_for_all,
)
from sparse_lora_dist.checkpoint.restore import restore
from sparse_lora_dist.checkpoint.retain import retain
from sparse_lora_dist.checkpoint.save import Saver
from sparse_lora_dist.checkpoint.saved_slices import SavedSlices

__all__ = [
    "Progress",
    "SavedSlices",
    "Saver",
    "check_description",
    "check_tensors",
    "clean",
    "find_damage",
    "newest_whole",
    "published",
    "published_for_all",
    "read_manifest",
    "restore",
    "retain",
    "set_aside",
    "step_of",
]
