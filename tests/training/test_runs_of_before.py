"""A run folder made at commit 71bf4ff, before the files of the package were moved, goes on.

Three kinds of state: AdaLoRA in the middle of its budget with dropout and accumulation, IncreLoRA
with births and 8-bit moments, PST with masks that it keeps. ``make.py`` beside them made
them: 6 of 12 steps on 2 ranks, and where the same run came to in the end.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import Ranks
from tests.fixtures.run_of_71bf4ff.make import OPTIONS
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import some

MADE = Path(__file__).parents[1] / "fixtures" / "run_of_71bf4ff"
MEASURED = ("tokens_per_s", "peak_memory_bytes")
"""What a row of metrics measures of one program, besides what it computes."""


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that the ranks' files hold, but for random states."""
    files = sorted(checkpoint.glob("rank_*.safetensors"))
    return {
        f"{file.stem}/{name}": t
        for file in files
        for name, t in load_file(file).items()
        if not name.startswith("rng/")
    }


def records(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    """Its model and data, by the names that its files have for them."""
    folder = tmp_path / "fixture"
    shutil.copytree(MADE, folder)
    return TinyRun(
        model=folder / "model", data=folder / "train.jsonl", held_out=folder / "held_out.jsonl"
    )


def flags(old: TinyRun, folder: Path, method: str, **options: object) -> list[str]:
    usual: dict[str, object] = {"method": method, "max_steps": 12, "rank": 2, "save_every": 6}
    usual |= {"eval_every": 6, "learning_rate": 2e-3}
    return old.flags(folder, **usual | OPTIONS[method] | options)


@pytest.mark.parametrize("method", some(OPTIONS, "adalora increlora"))
def test_a_run_of_before_goes_on_to_the_end_that_it_had(
    ranks: Ranks, old: TinyRun, tmp_path: Path, method: str
) -> None:
    """Bit for bit on a machine that computes the first six steps as the one that made them did, and
    else within rounding: processors differ in the order in which they add."""
    run, anew = old.model.parent / method, tmp_path / "anew"
    ranks(2, "tests.work.run:train", flags=flags(old, run, method, resume="auto"))
    ranks(2, "tests.work.run:train", flags=flags(old, anew, method, stop_after=6))
    first = tensors(MADE / method / "checkpoints" / "step_00000006")
    mine = tensors(anew / "checkpoints" / "step_00000006")
    assert mine.keys() == first.keys()
    alike = all(torch.equal(mine[n], first[n]) for n in first)

    end, came_to = (
        tensors(MADE / f"{method}_end" / "step_00000012"),
        tensors(run / "checkpoints" / "step_00000012"),
    )
    assert came_to.keys() == end.keys()
    for name, t in end.items():
        if alike:
            assert torch.equal(came_to[name], t), name
        elif t.is_floating_point():
            torch.testing.assert_close(came_to[name], t, rtol=1e-3, atol=1e-5)
    for file in ("metrics.jsonl", "decisions.jsonl"):
        if (MADE / f"{method}_end" / file).exists() and alike:
            assert records(run / file) == records(MADE / f"{method}_end" / file)
    print("bit for bit" if alike else "within rounding")


@pytest.mark.parametrize("method", OPTIONS)
def test_what_a_run_of_before_saved_is_read_bit_for_bit(
    ranks: Ranks, old: TinyRun, tmp_path: Path, method: str
) -> None:
    """Saved again in another folder, before its first step, it is what was read."""
    run, again = old.model.parent / method, tmp_path / "again"
    resume = run / "checkpoints" / "step_00000006"
    words = flags(old, again, method, resume=resume, stop_after=7)
    ranks(2, "tests.work.run:train", flags=words)
    found = tensors(again / "checkpoints" / "step_00000006")
    saved = tensors(resume)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
