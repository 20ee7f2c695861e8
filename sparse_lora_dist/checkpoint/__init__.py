"""Stage SAVE: write and read sharded checkpoints of all training state.

They are published whole or not at all, and contain neither pickles nor base weights.

    checkpoints/step_00000100/
        rank_00000.safetensors ...   one rank's slices; the metadata holds the range of each
        manifest.json                written last, with the hash of every file; a folder without
                                     one is not a checkpoint
    checkpoints/latest               text file with the name of the newest checkpoint, for people

A rank's slice of a trained tensor "t" is stored under these keys:

    master/t                  fp32 master values
    live/t                    mask of live entries, one bit per entry
    stat0/t ...               importance statistics, fp32
    exp_avg/t, exp_avg_sq/t   moments, fp32, live entries only
    born/t                    birth steps, int32, live entries only; one value if all are equal

A rank's file also has these keys:

    kept/t                    bytes of a kept tensor, which a method writes and no gradient trains
    squares/s                 running mean of the squared inputs of site "s", float64
    rng/cpu, rng/cuda         states of the random generators

The components and statistics of each site are the same on every rank and are in the manifest. A
reader takes the ranges it needs from the files that hold them, so a checkpoint can be read by any
number of ranks.
"""

from sparse_lora_dist.checkpoint.manifest import (
    Progress,
    check_description,
    check_tensors,
    read_manifest,
)
from sparse_lora_dist.checkpoint.recover import (
    clean,
    find_damage,
    newest_whole,
    published,
    published_for_all,
)
from sparse_lora_dist.checkpoint.restore import restore
from sparse_lora_dist.checkpoint.retain import drop_later, retain
from sparse_lora_dist.checkpoint.save import Saver
from sparse_lora_dist.checkpoint.saved_slices import SavedSlices

__all__ = [
    "Progress",
    "SavedSlices",
    "Saver",
    "check_description",
    "check_tensors",
    "clean",
    "drop_later",
    "find_damage",
    "newest_whole",
    "published",
    "published_for_all",
    "read_manifest",
    "restore",
    "retain",
]
