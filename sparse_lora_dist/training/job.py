"""Do the work around the optimizer steps of a run: resume, metrics, held-out loss, checkpoints,
export."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparse_lora_dist import checkpoint
from sparse_lora_dist.base_model.weight_map import is_quantized
from sparse_lora_dist.checkpoint import Progress
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.data import MicroBatch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import StepProgress, print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import Stopped
from sparse_lora_dist.export import peft_adapter
from sparse_lora_dist.export.after_training import save_own_type
from sparse_lora_dist.methods import Method
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.model.prompting import Prompting
from sparse_lora_dist.optim.learning_rate import LearningRate, stage_of
from sparse_lora_dist.run_folder.attempts import Attempts
from sparse_lora_dist.run_folder.metrics_log import Metrics, peak_memory_bytes
from sparse_lora_dist.runtime import stop_signals, watchdog
from sparse_lora_dist.runtime.signal_lead import SignalLead
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.system.own_files import in_short
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.training import own_folder
from sparse_lora_dist.training.bad_steps import Health
from sparse_lora_dist.training.feed import DataFeed
from sparse_lora_dist.training.fits import check_first_loss
from sparse_lora_dist.training.journal import Journal, memory_and_traffic
from sparse_lora_dist.training.resume import Resume, describe
from sparse_lora_dist.training.step import StepResult, held_out_totals
from sparse_lora_dist.training.summary import (
    in_words,
    next_command,
    print_summary,
    row_in_words,
    say_held_out_part,
)
from sparse_lora_dist.zero3.engine import Engine


class Job:
    """One job of a run, and its work around the optimizer steps.

    A job is one start of the program; a run that is resumed has several. All ranks must call every
    method, in the same order.

    Args:
        config: options of the run.
        model: model with its adapters.
        feed: data of the run.
        engine: the DeepSpeed engine of the model.
        shards: this rank's shards of the trained tensors.
    """

    def __init__(
        self, config: Config, model: Model, feed: DataFeed, engine: Engine, shards: Shards
    ) -> None:
        self.config, self.model, self.feed = config, model, feed
        self.engine, self.shards = engine, shards
        self.folder = Path(config.run.output_dir)
        self.progress = Progress()
        self._seconds, self._tokens = 0.0, 0  # since the last row of metrics
        self._saver = checkpoint.Saver(self.folder / "checkpoints", beside=config.run.async_save)
        self._lead = SignalLead(config.run.signal_lead)
        self._saved_step = 0
        self._pending: dict[str, Any] | None = None
        self.task = TASKS[config.model.task]
        self.rate = _learning_rate(config, shards.method, feed.total_steps)
        is_own = config.data.chat_template is None
        self.prompting = Prompting.of(model, feed.rows.documents, is_own=is_own)

    def start(self, resume: Resume | None) -> None:
        """Restore a checkpoint if there is one, and open the files of the run folder. Log the
        held-out loss of a new run as step 0. Called once, before the first step.

        Args:
            resume: checkpoint to continue from; None for a new run.

        Raises:
            UserError: the held-out loss is not finite before the first step.
            Stopped: the run was asked to stop while the held-out loss was measured.
        """
        pending, ids, step = None, {}, None
        if resume is not None:
            self.progress = checkpoint.restore(
                resume.path, self.shards, resume.manifest, resume.reset
            )
            step = self._saved_step = self.progress.step
            if not resume.reset:
                pending, ids = resume.manifest["owed"], resume.manifest["trackers"]
        run = self.config.run
        with fail_together(f"opening the run folder {self.folder}", may_pass=True):
            if comm.rank() == 0 and resume is not None and run.resume != "auto":
                self._set_aside_later()
            # The record of a pending step may have been written before the job stopped. It is
            # written again below, so the old one is removed.
            last_logged = step if pending is None else self.progress.step - 1
            config = self.config.as_flat_dict()
            self.attempts = Attempts(
                self.folder, step=self.progress.step, total_steps=self.feed.total_steps
            )
            self.metrics = Metrics(
                self.folder, run.trackers, config, last_step=last_logged, run_ids=ids
            )
            self.journal = Journal(self.folder, last_step=step, last_stage=last_logged)
            self.health = Health(self.folder, run.max_bad_steps, last_step=step)
        self._shown = StepProgress(self.feed.total_steps, self.progress.step)
        self._held_out_part = self.feed.held_out_part(run.eval_batches)
        say_held_out_part(self.feed, run.eval_batches, resume)
        if resume is None and self.feed.held_out is not None:
            first = self.held_out()
            self.log(0, {}, held_out=first)
            check_first_loss(first["held_out_loss"])
        if resume is not None and resume.is_of(self.folder):
            self._retain(resume.path)  # the last job may have ended between saving and this
        elif resume is not None:
            # A checkpoint in this folder, so that --resume auto works before the first own save.
            self._pending = pending
            self.save(None)
            self._publish(self._saver.finish())
        if pending is not None:
            self._conclude(**pending)
        stop_signals.begin()

    def _set_aside_later(self) -> None:
        """Move the checkpoints of later steps than the present one out of the way, so that
        ``--resume auto`` does not take them: the run goes back behind them (``--resume FOLDER``).
        For rank 0 only."""
        published = checkpoint.published(self.folder / "checkpoints")
        later = [path for path in published if (checkpoint.step_of(path) or 0) > self.progress.step]
        if later:
            kept = checkpoint.set_aside(later, own_folder.records(self.folder))
            print_line(
                "kept",
                f"{in_short(path.name for path in later)}, later than step {self.progress.step}, "
                f"with copies of the records of the run, in {kept}",
            )

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rates of optimizer step ``step``. Called before the step.

        Also reset the optimizer's moments if the method asks for it and the step begins a new
        stage. A stage is a part of the run with a learning-rate schedule of its own.
        """
        start, _ = stage_of(step, self.rate.stages)
        if 0 < start == step - 1 and self.shards.method.stage_resets_moments:
            self.shards.reset_moments()
        self.engine.set_learning_rate(lambda born: self.rate.at(step, born))

    def after_step(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        result: StepResult,
        *,
        seconds: float,
        is_last: bool,
    ) -> None:
        """Count a step that was made; log, evaluate and save if due at this step. Called after each
        optimizer step.

        Args:
            step: number of the optimizer step, counted from 1.
            batches: this rank's micro-batches of the step.
            result: result of the step.
            seconds: duration of the step in seconds.
            is_last: True if this is the last step of the job, which always evaluates and saves.

        Raises:
            UserError: too many steps in a row had a loss or gradient that is not finite, or a file
                cannot be written.
            Stopped: the run was asked to stop.
        """
        self.progress = Progress(
            step=step,
            rows=self.progress.rows + self.feed.global_batch,
            tokens=self.progress.tokens + result.tokens,
        )
        self._seconds += seconds
        self._lead.step_took(seconds)
        self._tokens += result.tokens
        run = self.config.run
        self._publish(self._saver.poll())
        self.health.after_step(step, result, batches)
        if result.decision is not None:
            sites = self.journal.decision(step, result.decision, self.shards)
            self.metrics.log_sites(step, sites)
        ends = is_last or step in self.shards.method.stages
        evaluates = ends or is_due(step, run.eval_every)
        row = self._row(result) if evaluates or is_due(step, run.log_every) else None
        self._shown.advance(None if row is None else row_in_words(row))
        self._conclude(row, evaluates=evaluates, saves=ends or is_due(step, run.save_every))

    def _conclude(
        self, row: Mapping[str, float | int] | None, *, evaluates: bool, saves: bool
    ) -> None:
        """Evaluate, log and save after the present step, as the arguments say. If the run is
        stopped during the evaluation, its checkpoint lists these actions as pending, and the next
        job does them before its first step.

        Args:
            row: numbers of training to log, by name; None logs nothing.
            evaluates: True to measure the held-out loss.
            saves: True to save a checkpoint.
        """
        step = self.progress.step
        self._pending = {"row": row, "evaluates": evaluates, "saves": saves}
        held_out = self.held_out() if evaluates else {}
        self._pending = None
        if row is not None:
            self.log(step, row, held_out=held_out)
        if step in self.shards.method.stages:
            ranks = self.shards.ranks_now(step)
            loss = held_out.get("held_out_loss")
            results = {**self.shards.log_values, "live_ranks": ranks, "held_out_loss": loss}
            self.journal.stage(step, self.rate, self.metrics.path, results)
        if saves:
            self.save(held_out.get("held_out_loss"))

    def _row(self, result: StepResult) -> dict[str, float | int]:
        row = {
            "loss": result.loss,
            "learning_rate": self.rate.at(self.progress.step),
            "grad_norm": self.engine.gradient_norm(),
            "tokens": self.progress.tokens,
            "tokens_per_s": self._tokens / self._seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "live_entries": self.shards.num_live(),
            **self.shards.log_values,
            **memory_and_traffic(self.shards),
        }
        self._seconds, self._tokens = 0.0, 0
        return row

    def log(
        self, step: int, row: Mapping[str, float | int], *, held_out: Mapping[str, float]
    ) -> None:
        """Append one line to ``metrics.jsonl``, send it to the trackers, and print the held-out
        scores in it.

        Args:
            step: optimizer step after which the numbers were measured; 0 is before training.
            row: numbers of training by name; {} if there are none.
            held_out: scores of the held-out data at the same step by name; {} if there are none.
        """
        self.metrics.log({"step": step, **row, **held_out})
        if held_out:
            print_line("held-out", f"{in_words(held_out, self.task.target)} at step {step}")

    def held_out(self) -> dict[str, float]:
        """Measure the held-out loss and the task's other scores.

        Returns:
            Scores by their keys in metrics.jsonl, e.g. "held_out_loss" in nats per target; the same
            on every rank. {} without held-out data.
        """
        if self.feed.held_out is None:
            return {}
        batches = self.feed.held_out_batches(self.config.run.eval_batches)
        scores = self.task.scores(held_out_totals(self.engine, batches, self.task.tally))
        part = self._held_out_part
        return scores if part is None else {**scores, "held_out_rows": part}

    def save(self, held_out_loss: float | None) -> None:
        """Save a checkpoint of the present step. With ``--async_save`` saving only starts here, and
        a later step publishes the checkpoint, that is gives the complete folder its final name.

        Args:
            held_out_loss: held-out loss at this step, by which ``--keep_best`` chooses; None if it
                was not measured.
        """
        self._publish(self._saver.finish())
        saved_class = self.model.saved_class
        if saved_class is not None:
            trained = [site.name for site in self.model.sites]
            saved_class = saved_class.only([*trained, *self.model.full])
        about = {
            "description": describe(self.config, self.model, self.feed, self.shards.method),
            "total_steps": self.feed.total_steps,
            "config": self.config.as_flat_dict(),
            "base": self.model.name,
            "base_in_4_bits": is_quantized(self.model.files),
            "full_modules": list(self.model.full),
            "dropped_by_peft": self.model.dropped_by_peft,
            "saved_class": None if saved_class is None else saved_class.as_json(),
            "prompting": None if self.prompting is None else self.prompting.as_json(),
            "held_out_loss": held_out_loss,
            "held_out_rows": self._held_out_part,
            "held_out_seed": getattr(self.feed.held_out, "seed", None),
            "owed": self._pending,
            "trackers": self.metrics.run_ids,
        }
        self._saved_step = self.progress.step
        self._publish(self._saver.begin(self.shards, self.progress, about))

    def _publish(self, path: Path | None) -> None:
        """Do what follows when a checkpoint is complete: record how long it took to save, and
        remove the checkpoints that ``--keep_last`` and ``--keep_best`` do not keep.

        Args:
            path: folder of the complete checkpoint; None if there is none, and nothing is done.
        """
        if path is None:
            return
        stop_signals.save_took(self._saver.took_s)
        self._lead.save_took(self._saver.took_s)
        self._retain(path)

    def _retain(self, path: Path) -> None:
        """Remove the checkpoints before ``path`` that ``--keep_last`` and ``--keep_best`` do not
        keep."""
        run = self.config.run
        with fail_together("removing checkpoints", may_pass=True):
            if comm.rank() == 0:
                checkpoint.retain(path, keep_last=run.keep_last, keep_best=run.keep_best)

    def publish_what_is_saved(self) -> None:
        """Finish the checkpoint that is being written, if there is one. Called when the run ends
        with a ``UserError`` on all ranks. No further error is raised."""
        with suppress(Exception):  # a rank may be gone; the error that ends the run is printed
            self._shown.close()
            self._publish(self._saver.finish())

    def stop(self, why: Stopped) -> None:
        """Save a checkpoint of the last complete step, and print the command that continues the
        run. Called when the run was asked to stop.

        Args:
            why: the exception with the reason of the stop.
        """
        self._shown.close()
        if self.progress.step > self._saved_step:
            self.save(held_out_loss=None)
        self._publish(self._saver.finish())
        watchdog.set_phase("leaving", may_be_long=True)
        self.metrics.close()
        self.attempts.end("stopped", self.progress.step, str(why))
        comm.barrier()  # a launcher kills all ranks when the first one exits
        done = f"after {self.progress.step} of {self.feed.total_steps} steps, saved"
        print_line("stopped", f"by {why} {done if self.progress.step else 'before the first step'}")
        print_line("go on", next_command(self.config, self.feed, self.progress))

    def finish(self) -> None:
        """Finish the last checkpoint, export the adapter, and print the summary. Called after the
        last step of the job; not called if the job was stopped or failed."""
        watchdog.set_phase("exporting", may_be_long=True)  # a tracker may upload for long
        self._shown.close()
        if self.progress.step > self._saved_step:  # the caller of training() left before the end
            self.save(held_out_loss=None)
        self._publish(self._saver.finish())
        size = self._export()
        self.metrics.close()
        step, done = self.progress.step, self.progress.step == self.feed.total_steps
        why = "--stop_after" if step == self.config.train.stop_after and not done else ""
        self.attempts.end("finished" if done else "stopped", step, why)
        if comm.rank() == 0:
            own_folder.end_adapter(self.folder)
            print_summary(
                self.config,
                self.feed,
                self.progress,
                self.metrics.read(),
                model=self.model,
                adapter_bytes=size,
                goes_on=self.shards.method.redraws or self.shards.ended,
            )

    def _export(self) -> int:
        """Export the adapter to the folder ``adapter`` of the run folder.

        Returns:
            Size of its weights in bytes, on rank 0. It is 0 if nothing was written, either because
            all entries are pruned (a warning is printed) or because the method has no adapter to
            write.
        """
        with fail_together(f"writing {self.folder / 'adapter'}", may_pass=True):
            if comm.rank() == 0:
                own_folder.begin_adapter(self.folder)
        try:
            return peft_adapter.save_peft(
                self.folder / "adapter",
                self.model.adapters,
                self.model.full,
                peft_adapter.PeftAdapter(
                    base=self.model.name,
                    revision=self.config.model.revision,
                    task_type=self.task.peft_type,
                    classes=self.model.classes,
                    prompting=self.prompting,
                    saved_class=self.model.saved_class,
                ),
            )
        except peft_adapter.NoPair:
            return save_own_type(self.folder, self.folder / "adapter", own_folder.remove_adapter)
        except peft_adapter.NothingLives as error:
            print_line("warning", f"no adapter is written: {error}")
            with fail_together(f"removing {self.folder / 'adapter'}", may_pass=True):
                if comm.rank() == 0:  # an adapter of an earlier job would be taken for this one's
                    own_folder.remove_adapter(self.folder)
            return 0


def _learning_rate(config: Config, method: Method, total_steps: int) -> LearningRate:
    train, rewriting = config.train, method.rewriting
    newborn = train.warmup_steps if method.newborn_warmup is None else method.newborn_warmup
    if rewriting is not None and rewriting.resets_moments:
        newborn = 0  # all entries are born with the rewriting and follow the run's own warm-up
    return LearningRate(
        name=train.lr_schedule,
        peak=train.learning_rate,
        warmup_steps=train.warmup_steps,
        stages=method.stages or (total_steps,),
        first_stage_only=method.stage_rate == "first",
        newborn_warmup=newborn,
        newborn_restarts=method.newborn_restarts,
    )


def is_due(step: int, every: int) -> bool:
    """Return True if an action is due at optimizer step ``step``.

    Args:
        step: number of the optimizer step.
        every: number of steps from one action to the next; with 0 it is never due.
    """
    return every > 0 and step % every == 0
