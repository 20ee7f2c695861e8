"""A colleague with the same group opens what a run has written: its files follow the umask."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sparse_lora_dist import examples
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request
from sparse_lora_dist.report.report_command import report
from sparse_lora_dist.report.report_options import load_request as load_report
from sparse_lora_dist.system.tensor_files import save_file
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import in_full


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_a_file_of_tensors_has_the_mode_of_any_other_new_file(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert mode(tmp_path / "a.safetensors") == 0o666 & ~mask


def test_a_file_of_tensors_is_not_written_through_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=None)
    assert not (tmp_path / "elsewhere").exists()


def test_copied_examples_follow_the_umask(tmp_path: Path) -> None:
    with umask(0o077):
        examples.copy(examples.load_request([str(tmp_path / "mine")]))
    found = [*(tmp_path / "mine").rglob("*")]
    assert len(found) > 20
    assert {mode(path) for path in found} == {0o700, 0o600}


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # a figure of two steps
@pytest.mark.parametrize("mask", [0o027, in_full(0o022)])
def test_every_file_of_a_run_and_of_its_exports_can_be_read_by_whom_the_umask_lets(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, mask: int
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    options = {"max_steps": 2, "save_every": 1, "log_every": 1, "base_cache": cache}
    flags = tiny.flags(run, **options | {"trackers": "tensorboard", "method": "roselora"})
    ranks(1, "tests.work.run:train_under_umask", mask=mask, flags=flags)
    with umask(mask):
        for form in ("peft", "merged", "sparse_delta"):
            export(load_request([str(run), "--output", str(tmp_path / form), "--format", form]))
        report(load_report([str(run), "--output", str(tmp_path / "report.html"), "--png"]))
    found = {path: mode(path) for path in tmp_path.rglob("*") if not path.is_symlink()}
    folders = {path for path in found if path.is_dir()}
    assert len(found) - len(folders) > 30
    wrong = {
        str(path.relative_to(tmp_path)): oct(how)
        for path, how in found.items()
        if how != (0o777 if path in folders else 0o666) & ~mask
    }
    assert wrong == {}
