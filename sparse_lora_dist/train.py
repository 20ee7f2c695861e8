"""Make a training run from beginning to end: read the data, load the base, inject adapters, train,
save checkpoints and export the adapter."""

if __name__ == "__main__":  # python -m: --help and option errors need not wait for the imports
    from sparse_lora_dist.programs import train

    train()

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

from sparse_lora_dist.adapter.peft_agrees import not_applied
from sparse_lora_dist.base_model.weight_map import is_quantized
from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_launch, print_line
from sparse_lora_dist.distributed.device import check_same_bits, same_bits, torch_as_it_starts
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import Finished, Stopped, UserError
from sparse_lora_dist.methods import METHODS, Method
from sparse_lora_dist.methods.protocol.form import draw_nothing
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.plan.check import say_whether_it_fits
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder.description import write_description
from sparse_lora_dist.run_folder.shared_by_ranks import shared_by_all_ranks
from sparse_lora_dist.runtime import stop_signals, watchdog
from sparse_lora_dist.runtime.same_command import check_same_command
from sparse_lora_dist.sparsity.decisions import Decisions
from sparse_lora_dist.sparsity.rewriter import Rewriter
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.sparsity.sites import Sites
from sparse_lora_dist.system.shipped import ENGINE
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.training import own_folder
from sparse_lora_dist.training.feed import open_feed, with_held_out_of
from sparse_lora_dist.training.first_look import began_before, check_documents_apart, settle
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.training.purpose import TRAINING, Purpose
from sparse_lora_dist.training.resume import find_resume, is_requeued, source_of
from sparse_lora_dist.training.step import StepResult, train_step
from sparse_lora_dist.training.trained_over import check_init_adapter, same_init_adapter
from sparse_lora_dist.zero3 import nvme as zero3_nvme
from sparse_lora_dist.zero3.engine import Engine, check_loss_kernel


def run(config: Config, purpose: Purpose = TRAINING) -> None:
    """Make a training run from beginning to end: train, save checkpoints, export the adapter.
    Collective.

    Args:
        config: options of the run, from ``settings``, the same on every rank.
        purpose: which data the run trains on, what it does after the last step, and whether it
            replaces an earlier run. The default trains on ``--data``.

    Raises:
        UserError: an option, a file or the environment must be corrected, as the message says. All
            ranks raise the same error if its attribute ``shared`` is True.
        Stopped: on every rank, if the run was asked to stop. A checkpoint of the last complete step
            was saved, unless no step was made.
    """
    # A finished run that is started again, e.g. by the same sbatch command, is no failure.
    with suppress(Finished), training(config, purpose) as now:
        for step in now.steps:
            now.step(step)


@contextmanager
def training(config: Config, purpose: Purpose = TRAINING) -> Iterator["Training"]:
    """Context manager: set up or resume a run, and export the adapter on exit. Collective.

        with training(config) as now:
            for step in now.steps:
                now.step(step)

    Args:
        config: options of the run, from ``settings``, the same on every rank.
        purpose: which data the run trains on, what it does after the last step, and whether it
            replaces an earlier run. The default trains on ``--data``.

    Yields:
        The run, ready to make its next step. If the context is left before the last step, by
        ``break`` or ``return``, a checkpoint is saved, from which the run can be resumed. An
        exception of your own saves nothing: the run goes on from its last checkpoint.

    Raises:
        UserError: an option, a file or the environment must be corrected, as the message says. All
            ranks raise the same error if its attribute ``shared`` is True.
        Stopped: on every rank, if the run was asked to stop. A checkpoint of the last complete step
            was saved, unless no step was made.
        Finished: on every rank, if the run has made all its steps already. Its files stay as they
            are.
    """
    with comm.variables_of_one_rank(), _training(config, purpose) as now:
        yield now


@contextmanager
def _training(config: Config, purpose: Purpose) -> Iterator["Training"]:
    if not isinstance(config, Config):
        raise UserError(
            f"run() and training() take what settings() returns, got {type(config).__name__}."
        )
    if config.run.verify is not None:
        raise UserError(
            "verify checks checkpoints and trains nothing. Leave it out, or type: python "
            f"launcher/train.py --verify {config.run.verify}"
        )
    folder, timeout_s = Path(config.run.output_dir), seconds_in(config.run.collective_timeout)
    print_launch(comm.start(timeout_s))
    check_same_command(config, purpose.own)
    with fail_together("checking the output folder"):
        engine_config = engine_dict(config.run.ds_config, config, comm.world_size())
        check_same_bits(config.run.deterministic)
        check_own_folder(config, purpose)
    for note in ENGINE.notes(config.run.ds_config):
        print_line("note", note)
    # The lock comes before anything is written or removed: the files may be another job's.
    with (
        torch_as_it_starts(),
        same_bits(config.run.deterministic),
        stop_signals.listening(config.run.time_limit),
        run_lock.held(folder),
        shared_by_all_ranks(folder),
        watchdog.watched(folder, timeout_s),
    ):
        now = set_up(config, engine_config, purpose)
        try:
            now.begin()
            yield now
            now.check_process()
            if now.job.progress.step == now.job.feed.total_steps:
                purpose.conclude(now.job)
        except Stopped as why:
            now.job.stop(why)
            raise
        except UserError as error:
            if error.shared:
                now.job.publish_what_is_saved()
            raise
        finally:
            now.has_ended = True
        now.job.finish()


def set_up(config: Config, engine_config: dict[str, Any], purpose: Purpose) -> "Training":
    """Return the run, set up by ``Training``. Collective.

    Args:
        config: options of the run.
        engine_config: dict for ``deepspeed.initialize``.
        purpose: which data the run trains on.

    Raises:
        Stopped: the run was asked to stop while it was set up; a line on the screen says so.
    """
    try:
        return Training(config, engine_config, purpose)
    except Stopped as why:
        longer = " Give a longer --time_limit" if str(why) == "--time_limit" else ""
        print_line("stopped", f"by {why} before the first step: nothing is saved.{longer}")
        raise


class Training:
    """A run of which all parts are set up, and which makes one optimizer step per call of ``step``.

    The context manager ``training`` makes it, and calls ``begin`` before the first step.
    """

    def __init__(self, config: Config, engine_config: dict[str, Any], purpose: Purpose) -> None:
        """Set up the run: read the data, load the base, inject adapters. Collective.

        Args:
            config: options of the run, from ``settings``.
            engine_config: dict for ``deepspeed.initialize``, from ``engine_dict``.
            purpose: which data the run trains on, what it does after the last step, and whether it
                replaces an earlier run.

        Raises:
            UserError: an option, a file or the environment must be corrected, as the message says.
            Stopped: the run was asked to stop while it was set up.
        """
        check_loss_kernel()
        zero3_nvme.prepare(engine_config)
        model = Model.open(config, as_before=began_before(config))
        self.config = config = settle(config, model)
        zero3_nvme.check_space(
            engine_config, model.module, quantized=config.model.quantization == "nf4"
        )
        if config.train.max_steps is not None:  # refuse a wrong option before tokenising
            _build_method(config, model, config.train.max_steps)
        feed = (purpose.open_feed or open_feed)(config, model)
        stop_signals.check()
        method = _build_method(config, model, feed.total_steps)
        notes = (*model.left_out, *method.notes, *_of_peft(model, method))
        notes += tuple(of_evaluations(config.run, held_out=feed.held_out is not None))
        for note in notes:
            print_line("note", note)
        self._resume = find_resume(config, model, feed, method)
        resumes = self._resume is not None
        if self._resume is not None:
            feed = with_held_out_of(feed, self._resume.manifest, packing=config.packs)
        if config.adapter.init_adapter is not None and not resumes:
            with fail_together("comparing the base with that of --init_adapter"):
                check_init_adapter(config.adapter.init_adapter, model)
            same_init_adapter(config.adapter.init_adapter)
        with fail_together(f"opening the run folder {config.run.output_dir}", may_pass=True):
            # Before the memory plan is printed, because it names run.yaml, and before the load.
            if comm.rank() == 0:
                check_own_folder(config, purpose)  # again: the lock was free or stale until now
                folder = Path(config.run.output_dir)
                if purpose.replaces:  # only now: the new run has passed its checks
                    own_folder.clear(folder)
                own_folder.begin(folder, program=purpose.program, source=source_of(config))
                write_description(folder, config, feed.readings)
        say_whether_it_fits(config, model, engine_config)
        watchdog.set_phase("loading the base", may_be_long=True)
        self.row_seeds = model.load(config, method, engine_config, restored=resumes)
        stop_signals.check()
        optimizer = _optimizer(config, model)
        self.engine = Engine(model.module, optimizer, engine_config)
        sites = Sites(model.adapters, method, model.builder)
        self.shards = Shards(self.engine, optimizer, method, sparse=sites.tensors(), sites=sites)
        self.rewriter = Rewriter(self.shards, config.train.seed)
        self.job = Job(config, model, feed, self.engine, self.shards)
        self.loss_of = TASKS[config.model.task].loss
        self.last_step = min(config.train.stop_after or feed.total_steps, feed.total_steps)
        self._pid = os.getpid()
        self.has_ended = False
        """True once the block of ``training`` was left, which gives the lock back."""

    def begin(self) -> None:
        """Restore the checkpoint of a resumed run, or log the held-out loss of a new run as step 0.
        Called once, before the first call of ``step``. Collective.

        Raises:
            Stopped: the run was asked to stop while the held-out loss was measured.
        """
        if self._resume is None:
            if self.config.packs:
                check_documents_apart(self.config, self.engine)
            self.rewriter.begin()
        self.job.start(self._resume)
        self.decisions = Decisions(self.shards)

    @property
    def steps(self) -> range:
        """Numbers of the optimizer steps that this job has still to make, up to ``--stop_after`` or
        the end of the run. The first step of a run has number 1."""
        return range(self.job.progress.step + 1, self.last_step + 1)

    def step(self, step: int) -> StepResult:
        """Make one optimizer step; then log, evaluate and save if due at this step. Collective.

        Args:
            step: number of the step, the first of ``steps``.

        Returns:
            Loss and number of tokens of the step, and what the method changed at it (its decision);
            the same on every rank.

        Raises:
            UserError: it is not the next step; too many steps in a row had a loss or gradient that
                is not finite; or a file cannot be written.
            Stopped: the run was asked to stop, by a signal or ``--time_limit``.
        """
        if self.has_ended:
            raise UserError(
                f"step({step}) comes after the end of the block of training(). Continue the run in "
                "another one, with resume='auto'.",
                shared=True,
            )
        self.check_process()
        if type(step) is not int or step not in self.steps[:1]:
            raise UserError(
                f"step({step!r}) is not the next step: {list(self.steps[:1]) or 'none is left'}. "
                "Make the steps of training.steps in their order, each as an int.",
                shared=True,
            )
        with torch_as_it_starts():
            return self._step(step)

    def check_process(self) -> None:
        """Raise UserError in a process that was forked from that of the run. Not a collective."""
        if os.getpid() != self._pid:
            raise UserError(
                "This process was forked from that of the run, which alone makes its steps and "
                "writes its files. End it inside the block of training(), with os._exit(0)."
            )

    def _step(self, step: int) -> StepResult:
        started = time.perf_counter()
        self.engine.train()
        watchdog.set_phase("reading its batches", step=step)
        self.job.set_learning_rate(step)
        progress = self.job.progress
        batches = self.job.feed.batches(progress.rows, progress.step)
        self.rewriter.collect_inputs(step)
        result = train_step(
            self.engine,
            self.shards,
            self.decisions,
            batches,
            self.row_seeds,
            step=step,
            loss_of=self.loss_of,
        )
        rewritten = self.rewriter.after(step, applied=result.applied)
        result = result if rewritten is None else replace(result, decision=rewritten)
        seconds = time.perf_counter() - started
        is_last = step == self.last_step
        self.job.after_step(step, batches, result, seconds=seconds, is_last=is_last)
        return result


def check_own_folder(config: Config, purpose: Purpose) -> None:
    """Raise UserError if the run may not write into ``--output_dir``. Not a collective.

    Args:
        config: options of the run.
        purpose: the program of the run, and whether it replaces an earlier run.
    """
    source = source_of(config)
    resets = bool(config.run.reset) and not is_requeued()
    own_folder.check_folder(
        Path(config.run.output_dir),
        begins=config.run.resume == "never" or source is not None or resets,
        program=purpose.program,
        source=source,
        replaces=purpose.replaces,
    )


def _optimizer(config: Config, model: Model) -> SparseAdamW:
    train = config.train
    return SparseAdamW(
        model.param_groups(train.weight_decay),
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        eight_bit=train.moment_bits == 8,
    )


def of_evaluations(run: RunConfig, *, held_out: bool) -> list[str]:
    """Return notes about options of evaluations within a run.

    Args:
        run: options, of which those of evaluating and saving are used.
        held_out: True if the run has held-out data.
    """
    if held_out:
        return seldom_both(run)
    names, usual = ("eval_every", "eval_batches"), RunConfig()
    given = [f"--{name}" for name in names if getattr(run, name) not in (0, getattr(usual, name))]
    if not given:
        return []
    return [f"{' and '.join(given)} without effect: there are no held-out data. Give --eval_data"]


def seldom_both(run: RunConfig) -> list[str]:
    """Return a note if the steps that are evaluated and those that are saved seldom are the same,
    so that the checkpoint that --keep_best keeps is not that of the best evaluation."""
    steps = (run.eval_every, run.save_every)
    if run.keep_last is None or not run.keep_best or 0 in steps or max(steps) % min(steps) == 0:
        return []
    return [
        f"--keep_best chooses among steps that are both evaluated and saved: --eval_every "
        f"{steps[0]} and --save_every {steps[1]} meet every {lcm(*steps)} steps. Make one a "
        "multiple of the other"
    ]


def _build_method(config: Config, model: Model, total_steps: int) -> Method:
    context = config.run_context(total_steps, tuple(model.sites))
    try:
        method = METHODS[config.adapter.method].build(config.method_options, context)
    except ValueError as error:
        raise UserError(f"--method {config.adapter.method}: {error}", shared=True) from error
    _check_form(config, model, method)
    return method


def _of_peft(model: Model, method: Method) -> list[str]:
    notes = []
    if (dropped := model.dropped_by_peft) and method.form(model.sites[0]).to_lora is not None:
        notes = [f"{not_applied(dropped)}. Export with --format merged, or choose --target_modules"]
    if taken := model.taken_by_peft:
        notes.append(
            f"PEFT does not open the adapter of this run: it takes {taken[0]}, whose name ends "
            "with that of a module trained in full, for one too. Export with --format merged"
        )
    return notes


def _check_form(config: Config, model: Model, method: Method) -> None:
    form, plain = method.form(model.sites[0]), {"lora_a", "lora_b"}
    if form.masks_base and is_quantized(model.files):
        raise UserError(
            f"--method {method.name} prunes the base's own weights, but {config.model.model} is "
            "stored in 4 bits. Set --model to the unquantised model. --quantization nf4 still "
            "quantises it to 4 bits while loading.",
            shared=True,
        )
    if form.masks_base and config.adapter.dropout > 0.0:
        raise UserError(
            f"--dropout {config.adapter.dropout} would bring back at random the base weights that "
            f"--method {method.name} prunes. Set --dropout 0.",
            shared=True,
        )
    other = set(form.tensors) != plain or form.drawn is not draw_nothing
    if config.adapter.init_adapter is not None and other:
        raise UserError(
            f"--init_adapter gives the tensors A and B of LoRA, but --method {method.name} trains "
            f"other ones: {', '.join(form.tensors)}. "
            "Use a --method that trains A and B, such as lora or roselora.",
            shared=True,
        )
