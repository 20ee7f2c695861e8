"""Print the last lines of a run: what was trained, the result, and the command to type next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sparse_lora_dist.checkpoint import Progress
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, megabytes, print_line
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.system.program_names import command
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.training.feed import DataFeed
from sparse_lora_dist.training.resume import Resume

LARGEST = 1e300
"""Numbers of metrics.jsonl from here on are not of this program."""
SCORES = (("held_out_accuracy", "accuracy"), ("held_out_matthews", "Matthews"))
"""Scores that a task may have besides the loss: (key in metrics.jsonl, name on the screen)."""


def print_summary(
    config: Config,
    feed: DataFeed,
    progress: Progress,
    rows: Sequence[Mapping[str, Any]] | None,
    *,
    model: Model,
    adapter_bytes: int,
    goes_on: bool,
) -> None:
    """Print the summary of a run, when a job has made its last step and has exported the adapter.
    For rank 0 only.

    Args:
        config: options of the run.
        feed: data of the run, which has its number of steps.
        progress: how many optimizer steps and tokens the run has trained.
        rows: lines of metrics.jsonl as dicts, from ``read_records``; None if the last ones could
            not be written.
        model: the trained model.
        adapter_bytes: size of the exported adapter in bytes; 0 if none was exported.
        goes_on: True if a run that has done all its steps may be continued with more.
    """
    folder = Path(config.run.output_dir)
    device = comm.device().type
    where = f"on {counted(comm.world_size(), 'rank')} ({device})"
    curves = f"{command('tensorboard')} --logdir {quote(f'{folder}/tensorboard')}"
    is_lora = all(adapter.form.to_lora is not None for adapter in model.adapters)
    print_line("")
    print_line(
        "trained",
        f"{progress.step} of {feed.total_steps} steps, {progress.tokens:,} tokens, {where}",
    )
    _print_numbers(folder, rows, TASKS[config.model.task].target)
    if adapter_bytes:
        opens = "opens in peft.PeftModel"
        if (dropped := model.dropped_by_peft) and is_lora:
            opens = f"which PEFT applies without {', '.join(dropped)}: export a merged model"
        if model.taken_by_peft:
            opens = "which PEFT does not open: export a merged model"
        print_line("adapter", f"{folder}/adapter ({megabytes(adapter_bytes)}), {opens}")
    if not is_lora:
        export = f"{command('python')} launcher/export.py {quote(str(folder))} --format merged"
        print_line("model", f"{export} --output {quote(f'{folder}/merged')}")
    print_line(
        "curves", curves if "tensorboard" in config.run.trackers else f"{folder}/metrics.jsonl"
    )
    if goes_on or progress.step < feed.total_steps:
        print_line("go on", next_command(config, feed, progress))
    elif not is_lora:
        print_line(
            "go on", "the schedule is complete; start a new run with the merged model as --model"
        )
    elif adapter_bytes and feed.program.startswith("launcher/edit.py"):
        export = f"{command('python')} launcher/export.py {quote(str(folder))} --format merged"
        print_line(
            "go on",
            f"the schedule is complete; to edit further, merge the adapter ({export} --output DIR) "
            "and give the merged model as --model",
        )
    elif adapter_bytes:
        print_line(
            "go on",
            "the schedule is complete; start a new run with "
            f"--init_adapter {quote(f'{folder}/adapter')}",
        )
    else:
        print_line(
            "go on",
            "the schedule is complete and no adapter entry is alive; start a new run in another "
            "--output_dir and prune less",
        )


def _print_numbers(folder: Path, rows: Sequence[Mapping[str, Any]] | None, target: str) -> None:
    if rows is None:
        print_line("result", f"not known: {folder}/metrics.jsonl could not be written to the end")
    else:
        print_line("result", gain(rows, target))
        print_line("live", sparsity(rows))


def in_words(scores: Mapping[str, float], target: str) -> str:
    """Return the scores of the held-out data as text: the loss, and the task's other scores.

    Args:
        scores: scores by their keys in metrics.jsonl, e.g. "held_out_loss" (always needed) and
            "held_out_accuracy".
        target: what the loss is a mean over: "token" or "example".
    """
    others = [f"{name} {scores[key]:.4f}" for key, name in SCORES if key in scores]
    return ", ".join([f"{scores['held_out_loss']:.4f} nats per {target}", *others])


def row_in_words(row: Mapping[str, Any]) -> str:
    """Return the main numbers of a row of metrics as text for the progress of a run.

    Args:
        row: numbers by their keys in metrics.jsonl.
    """
    return (
        f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s, "
        f"peak {row['peak_memory_bytes'] / 1e9:.2f} GB, {row['live_entries']:,} live "
        f"(state {megabytes(row['state_bytes'])})"
    )


def gain(rows: Sequence[Mapping[str, Any]], target: str) -> str:
    """Return as text how the held-out loss and other scores changed from their first to their last
    record. Without held-out data, return how the training loss changed.

    Args:
        rows: lines of metrics.jsonl as dicts, from ``read_records``.
        target: what the loss is a mean over: "token" or "example".

    Returns:
        Text such as "held-out loss 2.1000 -> 1.8900 nats per token (-10.0%)". If fewer than two
        losses were logged, a text that says so.
    """
    for key, name in (("held_out_loss", "held-out loss"), ("loss", "training loss")):
        losses = _numbers(rows, key)
        if (bad := sum(key in row for row in rows) - len(losses)) > 0:
            return (
                f"the {name} was not finite in {bad} of its {bad + len(losses)} records: lower "
                "--learning_rate, and see bad_steps.jsonl"
            )
        if len(losses) > 1:
            loss = f"{losses[0]:.4f} -> {losses[-1]:.4f} nats per {target}"
            if losses[0] > 0:
                loss += f" ({100 * (losses[-1] / losses[0] - 1):+.1f}%)"
            return "; ".join([f"{name} {loss}", *_changes(rows)])
    return "the run is too short to show a change: raise --max_steps"


def _numbers(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the values of one key that are numbers: metrics.jsonl may hold foreign records."""
    values = (row.get(key) for row in rows)
    return [float(v) for v in values if isinstance(v, int | float) and abs(v) < LARGEST]


def _changes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    seen = {name: _numbers(rows, key) for key, name in SCORES}
    return [f"{name} {v[0]:.4f} -> {v[-1]:.4f}" for name, v in seen.items() if len(v) > 1]


def sparsity(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return as text the number of live entries (those that the optimizer updates) at the first and
    the last logged step, and the size of one rank's optimizer state at the end and at its peak.

    Args:
        rows: lines of metrics.jsonl as dicts, from ``read_records``.
    """
    keys = ("live_entries", "state_bytes", "state_bytes_peak")
    steps = [row for row in rows if all(_numbers([row], key) for key in keys)]
    if not steps:
        return "no step was logged"
    first, last = steps[0], steps[-1]
    peak = max(row["state_bytes_peak"] for row in steps)
    return (
        f"{first['live_entries']:,} -> {last['live_entries']:,} entries; optimizer state of a rank "
        f"{megabytes(last['state_bytes'])}, at its peak {megabytes(peak)}"
    )


def next_command(config: Config, feed: DataFeed, progress: Progress) -> str:
    """Return the command line that continues the run after the last step that it has made.

    Args:
        config: options of the run.
        feed: data of the run, which has its number of steps and the program that started it.
        progress: how many optimizer steps the run has made. If it has made all of them, the command
            doubles ``--max_steps``.
    """
    launch = this_launch()
    words = [f"{command('deepspeed')} --quiet --num_gpus {comm.world_size()} {feed.program}"]
    on_nodes = launch.local_size < launch.world_size
    if launch.launcher in ("torchrun", "mpirun", "srun") or on_nodes:
        words = ["the same launcher and program with"]
    words += [f"--config {quote(f'{config.run.output_dir}/run.yaml')} --resume auto"]
    if config.train.stop_after is not None:
        words.append("--stop_after null")
    if progress.step >= feed.total_steps:
        words.append(f"--max_steps {2 * feed.total_steps}")
    return " ".join(words)


def say_held_out_part(feed: DataFeed, limit: int, resumed: Resume | None) -> None:
    """Print a note if only a part of the held-out rows is scored, and one if the job before this
    one scored another part.

    Args:
        feed: data of the run.
        limit: value of ``--eval_batches``.
        resumed: checkpoint that the run continues from; None for a new run.
    """
    if feed.held_out is None:
        return
    part, rows = feed.held_out_part(limit), len(feed.held_out)
    if part is not None:
        print_line(
            "note",
            f"held-out scores are those of the first {part:,} of {rows:,} rows "
            f"(--eval_batches {limit} of {feed.global_batch} rows)",
        )
    if resumed is None or resumed.manifest.get("held_out_rows", part) == part:
        return
    before = resumed.manifest["held_out_rows"]
    were = "all rows" if before is None else f"the first {before:,} rows"
    print_line(
        "note",
        f"until step {resumed.step} held-out scores were those of {were}, which cannot be compared "
        "with others: --keep_best keeps the best of both, the result and reports show later ones",
    )
