"""Prepare a run folder (``--output_dir``) before the first step: check that a run may write into
it, and write the files that describe the run."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.version import __version__

RUN_YAML = "run.yaml"
"""File with the merged config of a run; a folder that has it is a run folder."""
MADE = """
    run.yaml environment.json metrics.jsonl decisions.jsonl stages.jsonl bad_steps.jsonl
    attempts.jsonl edits.json tensorboard checkpoints adapter
""".split()
"""Files and folders that a run writes into its folder, besides the lock."""
PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "datasets", "peft", "safetensors")
"""Packages whose versions ``environment.json`` records."""


def check_folder(folder: Path, *, begins: bool, replaces: bool = False) -> None:
    """Raise UserError if a run may not write into ``folder``. Not a collective.

    A folder that has only run.yaml and environment.json, of a run that ended before its first step,
    may be used again.

    Args:
        folder: the run folder; it need not exist.
        begins: True if the run starts from step 0, so that the folder must not hold a run already.
        replaces: True if an earlier run in the folder will be removed (``--overwrite``). Files of
            a run without a run.yaml are refused.

    Raises:
        UserError: the folder already holds a run, cannot be replaced, or is not writable.
    """
    made = [name for name in MADE if (folder / name).exists()]
    if replaces and made and RUN_YAML not in made:
        raise UserError(
            f"--overwrite cannot replace {folder}: it holds {made[0]} but no run.yaml, so it is "
            "not a run folder and is not removed. Choose another --output_dir."
        )
    if begins and not replaces and {"metrics.jsonl", "checkpoints"} & set(made):
        raise UserError(
            f"--output_dir {folder} already holds a run. Continue it with --resume auto, or start "
            "a new run: choose another --output_dir, or remove that folder."
        )
    probe = folder if folder.exists() else next(p for p in folder.absolute().parents if p.exists())
    if not os.access(probe, os.W_OK):
        raise UserError(
            f"--output_dir {folder} cannot be used, since {probe} is not writable. Choose another "
            "--output_dir."
        )


def clear(folder: Path) -> None:
    """Remove the files and folders that an earlier run wrote into the run folder ``folder``, except
    the lock. For rank 0 only."""
    for path in (folder / name for name in MADE):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_description(
    folder: Path, config: Config, data: Mapping[str, object] | None = None
) -> None:
    """Write run.yaml and environment.json into a run folder. For rank 0 only.

    run.yaml holds the value of every option, and ``--config`` reads it. environment.json holds the
    result of ``environment`` and, as "data", what was read of the data.

    Args:
        folder: the run folder; it is made if it does not exist.
        config: options of the run.
        data: option -> what was read of its data set, as JSON values: files, columns, template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = config.as_flat_dict() | {"reset": []}  # --reset applies to one start only
    (folder / RUN_YAML).write_text(yaml.safe_dump(options, sort_keys=False))
    found = environment() | {"data": dict(data or {})}
    (folder / "environment.json").write_text(json.dumps(found, indent=2) + "\n")


def environment() -> dict[str, object]:
    """Return the content of ``environment.json``: a dict of JSON values with versions of packages,
    git commit, number of ranks, type of device and command line."""
    return {
        "sparse_lora_dist": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "world_size": comm.world_size(),
        "device": comm.device().type,
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the hash of the git commit of this source tree, with "+changes" added if files differ
    from the commit. Return None outside a git clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed.strip() else "")
