"""The programs that a person starts, each with the options of its command line.

``launcher/train.py``, ``sparse-lora-train`` and ``python -m sparse_lora_dist.train`` all call
``train`` here, and so for the others. Modules that take long to import are imported inside the
functions, so that ``--help`` and option errors need not wait for transformers and DeepSpeed.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.system.imports import large_imports

if TYPE_CHECKING:
    from sparse_lora_dist.config.config import Config
    from sparse_lora_dist.editing.edit_options import EditRequest
    from sparse_lora_dist.evaluation.eval_options import EvalRequest
    from sparse_lora_dist.export.export_options import ExportRequest
    from sparse_lora_dist.plan.plan_options import PlanRequest
    from sparse_lora_dist.report.report_options import ReportRequest
    from sparse_lora_dist.show.show_options import ShowRequest


def _reader(module: str, name: str) -> Callable[[Sequence[str]], Any]:
    """Return the function of a module that reads a program's options. The module is imported, with
    libraries, once that function is called, so that a failure has its message."""

    def read(argv: Sequence[str]) -> Any:
        with large_imports():
            function = getattr(import_module(f"sparse_lora_dist.{module}"), name)
        return function(argv)

    return read


def train() -> None:
    """Fine-tune a sharded 4-bit language model, or check the checkpoints of ``--verify``."""
    run_program(sys.argv[1:], _reader("config.load", "load_config"), _train)


def evaluate() -> None:
    """Evaluate a sharded model with or without adapters."""
    run_program(sys.argv[1:], _reader("evaluation.eval_options", "load_request"), _evaluate)


def edit() -> None:
    """Change facts that a language model knows."""
    run_program(sys.argv[1:], _reader("editing.edit_options", "load_request"), _edit)


def export() -> None:
    """Export the adapter of a run as files that other tools open."""
    run_program(sys.argv[1:], _reader("export.export_options", "load_request"), _export)


def grid() -> None:
    """Print the runs of a sweep, or the options of one."""
    run_program(sys.argv[1:], _reader("config.sweep", "load_grid"), _grid)


def plan() -> None:
    """Plan the memory, traffic and time of a run."""
    run_program(sys.argv[1:], _reader("plan.plan_options", "load_request"), _plan)


def report() -> None:
    """Write a report of a run as one HTML page, or compare several runs."""
    run_program(sys.argv[1:], _reader("report.report_options", "load_request"), _report)


def show() -> None:
    """Print the modules of an adapter or a checkpoint."""
    run_program(sys.argv[1:], _reader("show.show_options", "load_request"), _show)


def examples() -> None:
    """Copy the files to start from into a folder."""
    from sparse_lora_dist.examples import copy, load_request

    run_program(sys.argv[1:], load_request, copy)


def _choose_device(asked: str) -> None:
    from sparse_lora_dist.distributed.device import choose_device

    choose_device(asked)


def _train(config: "Config") -> None:
    if config.run.verify is not None:
        from sparse_lora_dist.checkpoint.verify import verify

        verify(Path(config.run.verify))
        return
    this_launch().check_address()  # before torch asks for it, for minutes
    with large_imports():
        _choose_device(config.run.device)
        from sparse_lora_dist.train import run

    run(config)


def _evaluate(request: "EvalRequest") -> None:
    this_launch().check_address()
    with large_imports():
        _choose_device(request.run.device)
        from sparse_lora_dist.evaluation.eval_command import evaluate

    evaluate(request)


def _edit(request: "EditRequest") -> None:
    if request.options.only_read:
        print(request.file.report())
        return
    this_launch().check_address()
    with large_imports():
        _choose_device(request.run.device)
        from sparse_lora_dist.editing.edit_command import purpose_of
        from sparse_lora_dist.train import run

    run(request.config, purpose_of(request))


def _export(request: "ExportRequest") -> None:
    with large_imports():
        from sparse_lora_dist.export.export_command import export

    export(request)


def _grid(request: Any) -> None:
    from sparse_lora_dist.config.sweep import show

    show(request)


def _plan(request: "PlanRequest") -> None:
    with large_imports():
        from sparse_lora_dist.plan.plan_command import plan

    plan(request)


def _report(request: "ReportRequest") -> None:
    with large_imports():
        from sparse_lora_dist.report.report_command import report

    report(request)


def _show(request: "ShowRequest") -> None:
    with large_imports():
        from sparse_lora_dist.show.show_command import show

    show(request)
