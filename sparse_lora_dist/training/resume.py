"""Find the checkpoint that a run continues from, and check that it fits before weights are read."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparse_lora_dist import checkpoint
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods import Method
from sparse_lora_dist.methods.protocol.form import draw_nothing
from sparse_lora_dist.methods.protocol.method import decide_nothing
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.training.feed import DataFeed

# Options that do not change what is trained: a resume does not report that they changed.
FREE = """
    base_cache resume reset verify output_dir stop_after log_every eval_every eval_batches
    save_every async_save keep_last keep_best max_bad_steps collective_timeout time_limit
    signal_lead trackers debug
"""


DATA_KEYS = ("seed", "packing", "sequence_length", "rows_per_epoch")
"""Keys of a description that concern the data; with ``--reset data`` their values may differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """A checkpoint that fits this run."""

    path: Path
    """Folder of the checkpoint."""
    manifest: Mapping[str, Any]
    """Its manifest, as ``checkpoint.read_manifest`` reads it."""
    reset: frozenset[str] = frozenset()
    """States that are not restored but begin anew: any of optimizer, schedule, data."""

    def is_of(self, run: Path) -> bool:
        """Whether the checkpoint lies in the run folder ``run``."""
        return self.path.resolve().parent == (run / "checkpoints").resolve()

    @property
    def step(self) -> int:
        """Optimizer step that the run starts from; 0 with ``--reset schedule``."""
        return 0 if "schedule" in self.reset else int(self.manifest["progress"]["step"])


def find_resume(config: Config, model: Model, feed: DataFeed, method: Method) -> Resume | None:
    """Find the checkpoint that ``--resume`` names, and check that this run can continue from it.
    Collective.

    Returns:
        The checkpoint; None for a run that starts from step 0.

    Raises:
        UserError: it is damaged, belongs to another run, or is past the end of this one; on every
            rank.
    """
    wanted = config.run.resume
    if wanted == "never":
        return None
    path = _saved_since_requeue(config) or _requested(wanted, _own(config))
    if path is None:
        return None
    reset = frozenset() if path.parent == _own(config) else frozenset(config.run.reset)
    with fail_together(f"opening {path}"):
        manifest = checkpoint.read_manifest(path)
        found = Resume(path=path, manifest=manifest, reset=reset)
        saved, now = manifest["description"], describe(config, model, feed, method)
        for name in DATA_KEYS if "data" in found.reset else ():
            saved.pop(name), now.pop(name)
        if saved.get("rows", "") != feed.identity:
            raise UserError(
                f"{path} was trained on other edits. Give the same --edits and --number, or start "
                "a new run in another --output_dir."
            )
        _check_global_batch(path, saved["global_batch"], feed)
        checkpoint.check_description(path, saved, now)
        checkpoint.check_tensors(path, manifest["tensors"], model.trained_shapes(method))
        _check_steps(found, config, feed, method)
    _print_resume(found, config, feed)
    return found


def is_requeued() -> bool:
    """Whether Slurm has requeued this job, so that it runs again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _own(config: Config) -> Path:
    return Path(config.run.output_dir) / "checkpoints"


def _saved_since_requeue(config: Config) -> Path | None:
    """The newest checkpoint that earlier attempts of a requeued job have saved; None if there is
    none. The job's command line is the same each time, so ``--resume FOLDER`` would start from
    FOLDER each time."""
    run = config.run
    if run.resume == "auto" or not is_requeued():
        return None
    newest = checkpoint.newest_whole(_own(config))
    began = {} if newest is None else checkpoint.read_manifest(newest)["config"]
    same = (began.get("resume"), began.get("reset")) == (run.resume, list(run.reset))
    return newest if same else None


def _requested(wanted: str, folder: Path) -> Path | None:
    """The intact checkpoint that ``--resume`` names: the newest in ``folder``, or a path."""
    with fail_together(f"cleaning {folder}"):
        if comm.rank() == 0:
            checkpoint.clean(folder)
    if wanted == "auto":
        return checkpoint.newest_whole(folder)
    damage = checkpoint.find_damage(Path(wanted))
    if damage is not None:
        raise UserError(f"{damage} Resume from another step.", shared=True)
    return Path(wanted)


def describe(config: Config, model: Model, feed: DataFeed, method: Method) -> dict[str, Any]:
    """Description of a run for its checkpoints: values that a resume must not change. Collective.

    Returns:
        JSON values by name.
    """
    return {
        "base": model.identity,
        "quantization": config.model.quantization,
        "double_quant": config.model.double_quant,
        "method": config.adapter.method,
        "preset": getattr(config.method_options, f"{config.adapter.method}_preset", None),
        "statistics": [method.n_stats, method.n_site_stats],
        "alpha": config.adapter.alpha,
        "seed": config.train.seed,
        "packing": config.packs,
        "sequence_length": config.data.sequence_length,
        "rows_per_epoch": len(feed.rows),
        "global_batch": feed.global_batch,
        **_options_of_tensors(config, model, method),
        # Only where needed: checkpoints of earlier versions lack these keys.
        **({"rows": feed.identity} if feed.identity else {}),
        **({"task": config.model.task, "classes": model.classes} if model.classes else {}),
    }


def _check_global_batch(path: Path, saved: int, feed: DataFeed) -> None:
    if saved == feed.global_batch:
        return
    ranks = comm.world_size()
    found = (
        f"{path} trains {saved} rows a step, but --micro_batch_size {feed.micro_batch_size} x "
        f"--gradient_accumulation_steps {feed.accumulation} x {counted(ranks, 'rank')} is "
        f"{feed.global_batch}. The number must stay the same, or data and schedules would change."
    )
    if saved % ranks:
        whole = [n for n in range(1, saved + 1) if saved % n == 0]
        near = [max(n for n in whole if n < ranks), *[n for n in whole if n > ranks][:1]]
        raise UserError(
            f"{found} {saved} rows cannot be divided among {counted(ranks, 'rank')}: use "
            f"{' or '.join(map(str, near))} ranks."
        )
    own = saved // ranks
    micro = max(n for n in range(1, min(own, feed.micro_batch_size) + 1) if own % n == 0)
    raise UserError(
        f"{found} Set --micro_batch_size {micro} --gradient_accumulation_steps {own // micro}."
    )


def _options_of_tensors(config: Config, model: Model, method: Method) -> dict[str, Any]:
    """The method's options, if the saved tensors depend on them: on what was drawn from the seed,
    kept or folded away. With other options the tensors would mean something else. {} for a method
    whose options concern its decisions only, which may change."""
    form = method.form(model.sites[0])
    is_drawn = form.drawn is not draw_nothing
    if method.decide is not decide_nothing and not form.kept and not is_drawn:
        return {}
    flat = config.as_flat_dict()
    options = {f.name: flat[f.name] for f in fields(config.method_options)}
    drawn_by = {"drawn by seed": config.train.seed} if is_drawn else {}
    as_json: dict[str, Any] = json.loads(json.dumps(options | drawn_by))  # tuples become lists
    return as_json


def _check_steps(found: Resume, config: Config, feed: DataFeed, method: Method) -> None:
    saved_end = found.manifest["total_steps"]
    free = method.redraws or found.manifest["ended"]
    if "schedule" in found.reset and not free:
        raise UserError(
            f"--reset schedule: {found.path} is in the middle of a schedule of {method.name}, "
            f"which cannot start again on what is left of the adapter. {_instead_of_reset(method)}"
        )
    if not free:
        differ = _changed(found, config, [f.name for f in fields(config.method_options)])
        if saved_end != feed.total_steps:
            differ.append(f"the last step {saved_end} -> {feed.total_steps}")
        if differ:
            raise UserError(
                f"{found.path} is in the middle of a schedule of {method.name} that ends with step "
                f"{saved_end}. A new schedule would undo decisions already made. Changed: "
                f"{', '.join(differ)}. Keep the old values (--max_steps {saved_end}), or start a "
                "new run in another --output_dir."
            )
    ends = (("max_steps", feed.total_steps), ("stop_after", config.train.stop_after))
    for name, last in ends:
        if last is not None and last < found.step:
            raise UserError(
                f"{found.path} is at step {found.step} already, but this run ends at step {last}: "
                f"raise --{name}, or resume from an earlier checkpoint."
            )


def _instead_of_reset(method: Method) -> str:
    if method.observes_until is not None:
        return "Resume it to its end first."
    return "Merge what it learned (launcher/export.py --format merged) and train that --model."


def _changed(found: Resume, config: Config, names: Iterable[str]) -> list[str]:
    """The text "name old -> new" for each of these options that has changed."""
    was, now = found.manifest["config"], config.as_flat_dict()
    return [f"{n} {was.get(n)} -> {now[n]}" for n in names if was.get(n) != now[n]]


def _print_resume(found: Resume, config: Config, feed: DataFeed) -> None:
    names = [name for name in config.as_flat_dict() if name not in FREE.split()]
    changed = ", ".join(_changed(found, config, names))
    what = [f"step {found.manifest['progress']['step']}"]
    what += [f"changed: {changed}"] if changed else []
    was, now = found.manifest["world_size"], comm.world_size()
    what += [f"{was} ranks -> {now}"] if was != now else []
    what += [f"reset: {', '.join(sorted(found.reset))}"] if found.reset else []
    print_line("resumes", f"{found.path}, {'; '.join(what)}")
    if found.manifest["total_steps"] != feed.total_steps:
        was_end = found.manifest["total_steps"]
        print_line(
            "", f"schedules are recomputed: they end at step {feed.total_steps}, not {was_end}"
        )
