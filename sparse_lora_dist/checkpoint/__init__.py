"""SAVE: sharded, atomic checkpoints of everything that trains, without pickle or base weights.

    checkpoints/step_00000100/
        rank_00000.safetensors ...   a rank's slices; the metadata holds the global offset of each
        manifest.json                written last, with hashes; without one it is no checkpoint
    checkpoints/latest               its name, for people

A slice of tensor "t" is stored as ``master/t`` (fp32), ``live/t`` (a bit an entry), the statistics
``stat0/t`` ..., and, packed to the live entries, ``exp_avg/t``, ``exp_avg_sq/t`` and ``born/t``
(int32; once, where all came to life together). What is the same on every rank (components and
statistics of each site) is in the manifest. A reader takes the ranges it needs from whichever files
hold them, so nothing here depends on how many ranks wrote.
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
