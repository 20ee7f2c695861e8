"""A pipe in place of a file is refused: whoever opens it would wait for a writer without end.

Where a test here fails, pytest hangs; ``WITHIN`` ends it.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sparse_lora_dist.adapter.peft_read import _open_files
from sparse_lora_dist.base_model.architecture import resolve_folder
from sparse_lora_dist.base_model.cache.lookup import read_about
from sparse_lora_dist.checkpoint.manifest import read_manifest
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.plan.plan_options import PlanConfig
from sparse_lora_dist.report.report_command import check_output
from sparse_lora_dist.report.run_data import read_run
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.show.show_command import as_text
from sparse_lora_dist.system.own_files import MARKER, read_marker

WITHIN = 20
"""Seconds after which a test that waits for a pipe is ended."""


@pytest.fixture(autouse=True)
def no_endless_wait() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(WITHIN)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config of a model": ("config.json", lambda d: resolve_folder(str(d), None)),
    "weights of a model": ("model.safetensors", lambda d: resolve_folder(str(d), None)),
    "tokenizer of a model": ("tokenizer.json", lambda d: resolve_folder(str(d), None)),
    "config of an adapter": ("adapter_config.json", lambda d: _open_files(str(d), "--adapter")),
    "weights of an adapter": ("adapter_model.safetensors", lambda d: _open_files(str(d), "--x")),
    "config shown": ("adapter_config.json", as_text),
    "weights shown": ("adapter_model.safetensors", as_text),
    "manifest": ("manifest.json", read_manifest),
    "options of a run": ("run.yaml", read_run),
    "metrics of a run": ("metrics.jsonl", read_run),
    "attempts of a run": ("attempts.jsonl", read_run),
    "environment of a run": ("environment.json", read_run),
    "metrics resumed": ("metrics.jsonl", lambda d: read_records(d / "metrics.jsonl")),
    "a cache": ("base_cache.json", read_about),
}


@pytest.mark.parametrize("who", READERS)
def test_a_pipe_that_would_be_read_is_named(who: str, tmp_path: Path) -> None:
    name, read = READERS[who]
    for other in ("run.yaml", "config.json", "adapter_config.json"):
        if other != name:
            (tmp_path / other).write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe or device, not a file") as caught:
        read(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_link_to_a_pipe_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").symlink_to(tmp_path / "p")
    with pytest.raises(UserError, match=r"config\.json is a pipe"):
        resolve_folder(str(tmp_path / "model"), None)


def test_files_that_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "my_own_pipe")
    (tmp_path / "lost.json").symlink_to(tmp_path / "nowhere")
    assert resolve_folder(str(tmp_path), None) == tmp_path


def test_a_marker_that_is_a_pipe_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MARKER)
    assert read_marker(tmp_path) is None


def test_a_report_is_not_written_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "page.html")
    with pytest.raises(UserError, match="--output .* is a pipe or device"):
        check_output(tmp_path / "page.html")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_plot_is_not_written_to_a_pipe(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "plot.png")
    with pytest.raises(ConfigError, match="--plot .* is a pipe or device"):
        PlanConfig(plot=str(tmp_path / "plot.png"), overwrite=overwrite)
