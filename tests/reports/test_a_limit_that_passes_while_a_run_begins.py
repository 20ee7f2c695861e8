"""A run that is asked to stop before its first step says so, and its report that it has no step."""

from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist import train
from sparse_lora_dist.errors import Stopped, UserError
from sparse_lora_dist.report.run_data import read_run


@pytest.mark.parametrize(
    ("why", "said"),
    [
        (
            "--time_limit",
            "stopped   by --time_limit before the first step: nothing is saved. Give a longer "
            "--time_limit\n",
        ),
        ("SIGTERM", "stopped   by SIGTERM before the first step: nothing is saved.\n"),
    ],
)
def test_a_stop_while_the_run_is_set_up_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str, said: str
) -> None:
    def stops(*_: Any) -> None:
        raise Stopped(why)

    monkeypatch.setattr(train, "Training", stops)
    with pytest.raises(Stopped):
        train.set_up(None, {}, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == said


def test_a_run_that_ended_before_its_first_record_has_none_yet(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl has no record yet"):
        read_run(tmp_path)
