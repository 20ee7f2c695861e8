"""Find the checkpoint that a run continues from, and check that it fits before weights are read."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sparse_lora_dist import checkpoint
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.paths import expanded, lies_in, real_path
from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.distributed.launch_slurm import restart_count
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import Finished, UserError, as_user_error
from sparse_lora_dist.methods import Method
from sparse_lora_dist.methods.protocol.form import draw_nothing
from sparse_lora_dist.methods.protocol.method import decide_nothing
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.run_folder.attempts import NAME as ATTEMPTS
from sparse_lora_dist.run_folder.identity import (
    BASE,
    LOOK,
    NOT_STORED,
    SHAPES_ROWS,
    WORDS,
    Identity,
    in_words,
)
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.system.own_files import claimed
from sparse_lora_dist.training.feed import DataFeed, rows_of

# Options that do not change what is trained: a resume does not report that they changed.
FREE = """
    device base_cache resume reset verify output_dir stop_after log_every eval_every eval_batches
    save_every async_save keep_last keep_best max_bad_steps collective_timeout time_limit
    signal_lead trackers debug
"""


DATA_KEYS = ("seed", "packing", "sequence_length", "rows_per_epoch")
"""Keys of a run's description (``describe``) that concern its data. With ``--reset data`` their
values may differ from those of the checkpoint."""
DATA_OPTIONS = tuple(f.name for f in fields(DataConfig))
"""Options that decide what the rows of the data are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """Checkpoint that the run continues from. It has been checked to fit the run."""

    path: Path
    """Folder of the checkpoint."""
    manifest: Mapping[str, Any]
    """Content of the checkpoint's manifest file, from ``checkpoint.read_manifest``: progress of the
    run, its options, its description (see ``describe``), shapes of the tensors ..."""
    reset: frozenset[str] = frozenset()
    """States that are not restored but start anew (``--reset``): any of "optimizer", "schedule",
    "data"."""

    def is_of(self, run: Path) -> bool:
        """Return True if the checkpoint lies in the run folder ``run``; False if it belongs to
        another run folder."""
        return lies_in(self.path, run / "checkpoints")

    @property
    def step(self) -> int:
        """Optimizer step that the run starts from; 0 with ``--reset schedule``."""
        return 0 if "schedule" in self.reset else int(self.manifest["progress"]["step"])


def find_resume(config: Config, model: Model, feed: DataFeed, method: Method) -> Resume | None:
    """Return the checkpoint that ``--resume`` names, after checking that this run can continue from
    it. Collective.

    Args:
        config: options of the run.
        model: model whose trained tensors must have the shapes of the checkpoint's.
        feed: data of the run.
        method: method of the run (``--method``).

    Returns:
        The checkpoint; None for a run that starts from step 0, because ``--resume`` is "never", or
        is "auto" and no checkpoint was saved yet.

    Raises:
        Finished: the run has made all its steps; on every rank. A line and the message say so.
        UserError: the checkpoint is missing or damaged, does not fit the options, model or data of
            this run, or is past the end of this run; on every rank.
    """
    wanted = config.run.resume
    if wanted == "never":
        return None
    path = _saved_since_requeue(config) or _requested(wanted, own_checkpoints(config))
    if path is None:
        folder = config.run.output_dir
        print_line("resumes", f"nothing: {folder} holds no checkpoint, so the run begins at step 0")
        return None
    reset = frozenset() if path.parent == own_checkpoints(config) else frozenset(config.run.reset)
    with fail_together(f"opening {path}"), as_user_error(str(path), "Resume from another step."):
        manifest = checkpoint.read_manifest(path)
        found = Resume(path=path, manifest=manifest, reset=reset)
        _check_description(found, config, describe(config, model, feed, method), feed)
        checkpoint.check_tensors(path, manifest["tensors"], model.trained_shapes(method))
        _check_steps(found, config, feed, method)
        finished = comm.rank() == 0 and _is_finished(found, config, feed)
    if comm.broadcast_object(finished):
        _print_finished(found, config)
        raise Finished(f"{config.run.output_dir} has made all its {found.step} steps already")
    _print_resume(found, config, feed)
    return found


def source_of(config: Config) -> Path | None:
    """Return the resolved path of the checkpoint of another run that ``--resume`` names; None if
    this run begins at step 0 or goes on with its own checkpoints."""
    wanted = config.run.resume
    if wanted in ("auto", "never"):
        return None
    path = real_path("--resume", Path(wanted))
    return None if lies_in(Path(expanded(wanted)), own_checkpoints(config)) else path


def _is_finished(found: Resume, config: Config, feed: DataFeed) -> bool:
    """Return True if the run has made all its steps, its last job has recorded that, and nobody has
    removed its adapter, which is then written again."""
    folder = Path(config.run.output_dir)
    jobs = read_records(folder / ATTEMPTS) if (folder / ATTEMPTS).exists() else []
    return (
        config.run.resume == "auto"
        and found.step == feed.total_steps == found.manifest["total_steps"]
        and bool(jobs)
        and (jobs[-1].get("event"), jobs[-1]["step"]) == ("finished", feed.total_steps)
        and ("adapter" not in claimed(folder) or (folder / "adapter").exists())
    )


def _print_finished(found: Resume, config: Config) -> None:
    folder, step = config.run.output_dir, found.step
    print_line(
        "finished",
        f"{folder} has made all its {step} steps already. Nothing is trained, and its files stay "
        "as they are. To train on, raise --max_steps, or begin another run in another --output_dir",
    )
    names = [name for name in config.as_flat_dict() if name not in FREE.split()]
    if changed := _changed(found, config, names):
        print_line("warning", f"these options have no effect: {', '.join(changed)}")


def is_requeued() -> bool:
    """Return True if Slurm has requeued this job, which means that it runs the same command line a
    second time or more."""
    return restart_count(os.environ) > 0


def own_checkpoints(config: Config) -> Path:
    """Return the folder of the run's own checkpoints."""
    return Path(config.run.output_dir) / "checkpoints"


def _saved_since_requeue(config: Config) -> Path | None:
    """Return the newest checkpoint that this Slurm job saved before it was requeued.

    Slurm runs the same command line each time it starts the job. Without this function,
    ``--resume FOLDER`` would begin from FOLDER each time.

    Returns:
        Folder of the checkpoint. None if the job was not requeued, if the newest checkpoint was
        saved with another ``--resume`` or ``--reset`` (so not by this job), or with
        ``--resume auto``, which finds that checkpoint anyway.
    """
    run = config.run
    if run.resume == "auto" or not is_requeued():
        return None
    newest = checkpoint.newest_whole(own_checkpoints(config))
    began = {} if newest is None else checkpoint.read_manifest(newest)["config"]
    same = (began.get("resume"), began.get("reset")) == (run.resume, list(run.reset))
    return newest if same else None


def _requested(wanted: str, folder: Path) -> Path | None:
    """Return the intact checkpoint that ``--resume`` names; None if "auto" finds none. Collective.

    Args:
        wanted: value of ``--resume``: "auto" for the newest in ``folder``, or a path.
        folder: folder of this run's checkpoints; unfinished ones are removed from it.

    Raises:
        UserError: the checkpoint at that path is damaged or missing; on every rank.
    """
    with fail_together(f"cleaning {folder}", may_pass=True):
        if comm.rank() == 0:
            checkpoint.clean(folder)
    if wanted == "auto":
        return checkpoint.newest_whole(folder)
    damage = checkpoint.find_damage(Path(wanted))
    if damage is not None:
        raise UserError(f"{damage} Resume from another step.", shared=True)
    return Path(wanted)


def _check_description(found: Resume, config: Config, now: dict[str, Any], feed: DataFeed) -> None:
    """Raise UserError if this run is another one than that of the checkpoint.

    Options that differ come first in the message; contents are compared if the options are the
    same, and the number of rows is one of them.

    Args:
        found: the checkpoint.
        config: options of this run.
        now: description of this run, from ``describe``.
        feed: data of this run.
    """
    saved = dict(found.manifest["description"])
    if saved.get("rows", "") != feed.identity:
        raise UserError(
            f"The checkpoint {found.path} was trained on other edits. Give the same --edits and "
            "--number, or start a new run in another --output_dir."
        )
    was, is_ = (Identity.from_json(about.pop("identity", {})) for about in (saved, now))
    if was.weights is not None:
        saved.pop("base"), now.pop("base")  # compared by content
    for name in DATA_KEYS if "data" in found.reset else ():
        saved.pop(name), now.pop(name)
    options = {*saved, *now} - {"rows_per_epoch"}
    if all(saved.get(name) == now.get(name) for name in options):
        _check_identity(found, config, was, is_)
    _check_global_batch(found.path, saved["global_batch"], feed)
    checkpoint.check_description(found.path, saved, now)


def identity_of(model: Model, feed: DataFeed) -> Identity:
    """Return hashes of the contents of a run's base and data. Not collective."""
    base = model.fingerprint
    assert base is not None
    return replace(feed.content, weights=base.weights, config=base.config)


def _check_identity(found: Resume, config: Config, saved: Identity, now: Identity) -> None:
    """Raise UserError if the base or the data of this run are not those of a checkpoint.

    What cannot be compared, because the checkpoint does not hold it, is said in one line.

    Args:
        found: the checkpoint. With ``--reset data`` only the base is compared.
        config: options of this run.
        saved: identity of the checkpoint's run.
        now: identity of this run.
    """
    if saved == Identity():
        print_line("note", f"{found.path} {NOT_STORED}, and so for the data and the tokenizer")
        return
    compared = BASE if "data" in found.reset else tuple(WORDS)
    differ = saved.differences(now, only=compared)
    if saved.has_all_rows_of(now):
        harmless = [name for name in differ if name in SHAPES_ROWS]
        differ = [name for name in differ if name not in SHAPES_ROWS]
        if harmless:
            print_line("note", f"changed, but all rows are the same: {in_words(harmless)}")
    if differ:
        raise UserError(_refusal(found, config, differ))


def _refusal(found: Resume, config: Config, differ: list[str]) -> str:
    """Return the message for a run whose base or data are not those of its checkpoint.

    Args:
        found: the checkpoint.
        config: options of this run.
        differ: names of the fields of ``Identity`` that differ.
    """
    over = "over another base" if {*differ} & {*BASE} else "on other data"
    changed = [] if {*differ} <= {*BASE} else _changed(found, config, DATA_OPTIONS)
    said = f"{found.path} was trained {over} than this run would be. What differs: "
    said += f"{in_words(differ)}. "
    if changed:
        said += f"Changed options: {', '.join(changed)}. "
    said += "Put back what it was, or start a new run in another --output_dir."
    if not {*differ} & {*BASE}:
        said += (
            f" To go on with other data on purpose, give --resume {found.path} --reset data and "
            "another --output_dir."
        )
    return said


def describe(config: Config, model: Model, feed: DataFeed, method: Method) -> dict[str, Any]:
    """Describe a run by the values that a resume must not change. Collective.

    Each checkpoint stores them. When a run is resumed, they are computed again and compared with
    the stored ones.

    Args:
        config: options of the run.
        model: model of the run; the identity of its base is one of the values.
        feed: data of the run; its numbers of rows per epoch and per optimizer step are two of them.
        method: method of the run (``--method``).

    Returns:
        Dict of JSON values, e.g. "seed", "method", "alpha".
    """
    return {
        "base": model.identity,
        "identity": identity_of(model, feed).as_json(),
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
        **({LOOK: 1} if model.look.matters and not model.as_before else {}),
        **({"task": config.model.task, "classes": model.classes} if model.classes else {}),
    }


def _check_global_batch(path: Path, saved: int, feed: DataFeed) -> None:
    if saved == feed.global_batch:
        return
    ranks = comm.world_size()
    found = (
        f"{path} was saved with {saved} rows a step, but --micro_batch_size "
        f"{feed.micro_batch_size} x --gradient_accumulation_steps {feed.accumulation} x "
        f"{counted(ranks, 'rank')} is {feed.global_batch}. The number of rows a step must stay the "
        "same, or data and schedules would change."
    )
    if saved % ranks:
        whole = [n for n in range(1, saved + 1) if saved % n == 0]
        near = [max(n for n in whole if n < ranks), *[n for n in whole if n > ranks][:1]]
        raise UserError(
            f"{found} {saved} rows cannot be divided among {counted(ranks, 'rank')}. Use "
            f"{' or '.join(map(str, near))} ranks."
        )
    own = saved // ranks
    micro = max(n for n in range(1, min(own, feed.micro_batch_size) + 1) if own % n == 0)
    raise UserError(
        f"{found} Set --micro_batch_size {micro} --gradient_accumulation_steps {own // micro}."
    )


def _options_of_tensors(config: Config, model: Model, method: Method) -> dict[str, Any]:
    """Return the method's options, if the tensors in a checkpoint depend on them.

    They do if the method makes tensors anew from the seed instead of saving them, saves tensors
    that no gradient trains (e.g. a mask), or makes no decisions during training. The same tensors
    would mean something else with other options. The options of any other method concern only its
    decisions, so they may change when a run is resumed.

    Returns:
        Dict from the name of an option to its JSON value; {} if the options may change.
    """
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
            f"--reset schedule cannot be used: {found.path} is in the middle of a schedule of "
            f"{method.name}, whose decisions cannot be undone. {_instead_of_reset(method)}"
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
                f"{found.path} is at step {found.step} already, but this run ends at step {last}. "
                f"Raise --{name}, or resume from an earlier checkpoint."
            )


def _instead_of_reset(method: Method) -> str:
    if method.observes_until is not None:
        return "Resume that run to its end first."
    return (
        "Merge its adapter (launcher/export.py --format merged), and start a new run with the "
        "merged model as --model."
    )


def _changed(found: Resume, config: Config, names: Iterable[str]) -> list[str]:
    """Return a text "name old -> new" for each option that has changed since the checkpoint was
    saved. Only the options of ``names`` are compared."""
    was, now = found.manifest["config"], config.as_flat_dict()
    return [f"{n} {was.get(n)} -> {now[n]}" for n in names if was.get(n) != now[n]]


def _print_resume(found: Resume, config: Config, feed: DataFeed) -> None:
    names = [name for name in config.as_flat_dict() if name not in FREE.split()]
    changed = ", ".join(_changed(found, config, names))
    what = [f"step {found.manifest['progress']['step']}"]
    what += [f"changed: {changed}"] if changed else []
    was, now = found.manifest["world_size"], comm.world_size()
    what += [f"ranks {was} -> {now}"] if was != now else []
    what += [f"reset: {', '.join(sorted(found.reset))}"] if found.reset else []
    print_line("resumes", f"{found.path}, {'; '.join(what)}")
    if found.manifest["total_steps"] != feed.total_steps:
        was_end = found.manifest["total_steps"]
        print_line(
            "", f"schedules are recomputed: they end at step {feed.total_steps}, not {was_end}"
        )
    if (left_out := _filled_up(found, feed)) > 0:
        print_line(
            "note",
            f"the last step of the shorter run had {counted(left_out, 'empty row')}; as many rows "
            "of the next pass over the data are left out",
        )


def _filled_up(found: Resume, feed: DataFeed) -> int:
    """Return with how many empty rows the checkpoint's run filled up its last step, if this run
    goes on after it; else 0."""
    progress, saved = found.manifest["progress"], found.manifest["config"]
    is_last = progress["step"] == found.manifest["total_steps"] < feed.total_steps
    if not is_last or saved.get("max_steps") is not None or found.reset:
        return 0
    per_epoch = found.manifest["description"]["rows_per_epoch"]
    return int(progress["rows"] - rows_of(saved["num_epochs"], per_epoch))
