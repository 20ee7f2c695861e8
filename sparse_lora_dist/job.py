"""What happens around the steps of a run: resume, log, held-out loss, save, export, summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lora_dist import checkpoint, comm, export
from sparse_lora_dist.checkpoint import Progress
from sparse_lora_dist.config import Config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.feed import Feed
from sparse_lora_dist.learning_rate import learning_rate_at
from sparse_lora_dist.metrics import Metrics, peak_memory_bytes, read_rows
from sparse_lora_dist.model import Model
from sparse_lora_dist.run_folder import write_description
from sparse_lora_dist.screen import progress_bar, say
from sparse_lora_dist.shards import Shards
from sparse_lora_dist.step import StepResult, held_out_loss
from sparse_lora_dist.summary import print_summary
from sparse_lora_dist.zero3 import Engine

# Options that say where and how long, not what is trained: a resume may change them without a word.
FREE = {
    "resume",
    "output_dir",
    "stop_after",
    "log_every",
    "eval_every",
    "eval_batches",
    "save_every",
    "trackers",
    "debug",
    "config",
}


class Job:
    """One program's part of a run. Every method is a collective."""

    def __init__(
        self, config: Config, model: Model, feed: Feed, engine: Engine, shards: Shards
    ) -> None:
        self.config, self.model, self.feed = config, model, feed
        self.engine, self.shards = engine, shards
        self.folder = Path(config.run.output_dir)
        self.progress = Progress()
        self._seconds, self._tokens = 0.0, 0  # since the last row of metrics
        self._rate = learning_rate_at(
            config.train.lr_schedule,
            peak=config.train.learning_rate,
            warmup_steps=config.train.warmup_steps,
            total_steps=feed.total_steps,
        )

    def start(self) -> None:
        """Go on from the checkpoint ``--resume`` names, or take the base's held-out loss."""
        found = self._checkpoint()
        if found is not None:
            with comm.together(f"opening {found}"):
                manifest = checkpoint.read_manifest(found)
                checkpoint.check_description(found, manifest["description"], self.description())
                self._check_steps(found, manifest["progress"]["step"])
            self.progress = checkpoint.restore(found, self.shards, manifest)
            self._say_resumed(found, manifest)
        with comm.together("opening the run folder"):
            if comm.rank() == 0:
                write_description(self.folder, self.config)
            self.metrics = Metrics(
                self.folder,
                self.config.run.trackers,
                self.config.as_flat_dict(),
                last_step=self.progress.step if found else None,
            )
        if found is None and self.feed.held_out is not None:
            self.log(0, {}, held_out=self.held_out_loss())
        self._bar = progress_bar(self.feed.total_steps, self.progress.step)

    def _checkpoint(self) -> Path | None:
        resume = self.config.run.resume
        if resume == "never":
            return None
        return checkpoint.newest(self.folder / "checkpoints") if resume == "auto" else Path(resume)

    def _check_steps(self, found: Path, step: int) -> None:
        train = self.config.train
        for name, last in (("max_steps", self.feed.total_steps), ("stop_after", train.stop_after)):
            if last is not None and last < step:
                raise UserError(
                    f"{found} is at step {step} already, but this run is to end at step {last}: "
                    f"raise --{name}, or resume from an earlier checkpoint."
                )

    def _say_resumed(self, found: Path, manifest: Mapping[str, Any]) -> None:
        was, now = manifest["config"], self.config.as_flat_dict()
        changed = [
            f"{k} {was.get(k)} -> {v}" for k, v in now.items() if k not in FREE and was.get(k) != v
        ]
        note = f"; changed: {', '.join(changed)}" if changed else ""
        say("resumed", f"{found}, step {self.progress.step}{note}")
        if manifest["total_steps"] != self.feed.total_steps:
            was_end, now_end = manifest["total_steps"], self.feed.total_steps
            say("", f"schedules derived anew: they end at step {now_end}, not {was_end}")

    def description(self) -> dict[str, Any]:
        """What must be the same for a resume to be the same run."""
        model, data, train = self.config.model, self.config.data, self.config.train
        return {
            "base": self.model.identity(),
            "quantization": model.quantization,
            "double_quant": model.double_quant,
            "method": self.config.adapter.method,
            "alpha": self.config.adapter.alpha,
            "seed": train.seed,
            "packing": data.packing,
            "sequence_length": data.sequence_length,
            "rows_per_epoch": len(self.feed.rows),
            "global_batch": self.feed.global_batch,
        }

    def set_learning_rate(self, step: int) -> None:
        """The schedule's value for optimizer step ``step``."""
        self.engine.set_learning_rate(self._rate(step))

    def after_step(self, step: int, result: StepResult, *, seconds: float, is_last: bool) -> None:
        """Count the step; log, evaluate and save where one is due."""
        self.progress = Progress(
            step=step,
            rows=self.progress.rows + self.feed.global_batch,
            tokens=self.progress.tokens + result.tokens,
        )
        self._seconds += seconds
        self._tokens += result.tokens
        run = self.config.run
        held_out = self.held_out_loss() if is_last or is_due(step, run.eval_every) else None
        if is_last or held_out is not None or is_due(step, run.log_every):
            self.log(step, self._row(result), held_out=held_out)
        if is_last or is_due(step, run.save_every):
            self.save()
        self._bar.update()

    def _row(self, result: StepResult) -> dict[str, float | int]:
        row = {
            "loss": result.loss,
            "learning_rate": self._rate(self.progress.step),
            "grad_norm": self.engine.gradient_norm(),
            "tokens": self.progress.tokens,
            "tokens_per_s": self._tokens / self._seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "live_entries": self.shards.num_live(),
        }
        self._seconds, self._tokens = 0.0, 0
        self._bar.set_postfix_str(
            f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s, "
            f"peak {row['peak_memory_bytes'] / 1e9:.2f} GB"
        )
        return row

    def log(self, step: int, row: Mapping[str, float | int], *, held_out: float | None) -> None:
        """One row of metrics; a held-out loss stands in the row of its step."""
        extra = {} if held_out is None else {"held_out_loss": held_out}
        self.metrics.log({"step": step, **row, **extra})
        if held_out is not None:
            say("held-out", f"{held_out:.4f} nats per token at step {step}")

    def held_out_loss(self) -> float | None:
        """Nats per target token of the held-out set; None without one."""
        if self.feed.held_out is None:
            return None
        return held_out_loss(self.engine, self.feed.held_out_batches(self.config.run.eval_batches))

    def save(self) -> None:
        """Publish a checkpoint of this step."""
        checkpoint.save(
            self.folder / "checkpoints",
            self.shards,
            self.progress,
            description=self.description(),
            total_steps=self.feed.total_steps,
            config=self.config.as_flat_dict(),
        )

    def finish(self) -> None:
        """Export the adapter and say what came of it all."""
        self._bar.close()
        self.metrics.close()
        size = export.save_peft(
            self.folder / "adapter",
            self.model.adapters,
            self.model.full,
            base=str(self.model.folder),
        )
        if comm.rank() == 0:
            rows = read_rows(self.metrics.path)
            print_summary(self.config, self.feed, self.progress, rows, adapter_bytes=size)


def is_due(step: int, every: int) -> bool:
    """Every so many steps; 0 is never."""
    return every > 0 and step % every == 0
