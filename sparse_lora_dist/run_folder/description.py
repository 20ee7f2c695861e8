"""Write the files of a run folder (``--output_dir``) that describe the run."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.yaml_file import yaml_of
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.system.own_files import claim
from sparse_lora_dist.version import __version__

RUN_YAML = "run.yaml"
"""File with the merged config of a run; a folder that has it is a run folder."""
ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "datasets", "peft", "safetensors")
"""Packages whose versions ``environment.json`` records."""


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
    claim(folder, RUN_YAML, ENVIRONMENT)
    write_whole(folder / RUN_YAML, yaml_of(options))
    found = environment() | {"data": dict(data or {})}
    write_whole(folder / ENVIRONMENT, json.dumps(found, indent=2) + "\n")


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
    from the commit.

    Return None if the package does not lie at the root of a git clone: installed into a project's
    environment, it would get the commit of that project.
    """
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root)]
    # In a hook of git, variables name the repository of the hook.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        top, commit = subprocess.run(
            [*git, "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            env=own,
        ).stdout.splitlines()
        if Path(top).resolve() != root.resolve():
            return None
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True, env=own
        ).stdout
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed.strip() else "")
