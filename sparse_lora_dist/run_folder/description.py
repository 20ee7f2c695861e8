"""The folder of a run: who may write to it, and what is written before the first step."""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.version import __version__

RUN_YAML = "run.yaml"
"""The merged config of a run, by which its folder is known."""
MADE = """
    run.yaml environment.json metrics.jsonl decisions.jsonl stages.jsonl bad_steps.jsonl
    attempts.jsonl edits.json tensorboard checkpoints adapter
""".split()
"""By a run, of which a new one makes its own."""
PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "datasets", "peft", "safetensors")


def check_folder(folder: Path, *, begins: bool, replaces: bool = False) -> None:
    """A run that begins must not write into the folder of another that made a step: one that died
    while it loaded left a description only. One that ``replaces`` another must find one."""
    made = [name for name in MADE if (folder / name).exists()]
    if replaces and made and RUN_YAML not in made:
        raise UserError(
            f"--overwrite: {folder} holds {made[0]}, but no run.yaml, so it is no run, and stays. "
            "Choose another --output_dir."
        )
    if begins and not replaces and {"metrics.jsonl", "checkpoints"} & set(made):
        raise UserError(
            f"--output_dir {folder} already holds a run. Go on with it: --resume auto. "
            "Start a new one: another --output_dir, or remove that folder."
        )
    probe = folder if folder.exists() else next(p for p in folder.absolute().parents if p.exists())
    if not os.access(probe, os.W_OK):
        raise UserError(
            f"--output_dir {folder}: {probe} is not writable. Choose another --output_dir."
        )


def clear(folder: Path) -> None:
    """Remove what an earlier run made, but the lock. Only rank 0 does."""
    for path in (folder / name for name in MADE):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_description(folder: Path, config: Config) -> None:
    """run.yaml (the merged config, good for --config) and environment.json."""
    folder.mkdir(parents=True, exist_ok=True)
    said = config.as_flat_dict() | {"reset": []}  # a run that goes on begins nothing anew
    (folder / RUN_YAML).write_text(yaml.safe_dump(said, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, object]:
    """What this run runs on."""
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
    """The commit of this source tree, "+changes" where files differ; None outside a clone."""
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
