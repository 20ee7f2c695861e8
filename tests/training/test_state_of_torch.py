"""A program set torch otherwise before it trained, trained in a thread, or after the end."""

from pathlib import Path

from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun

WORK = "tests.work.torch_state"


def test_what_a_program_has_set_of_torch_changes_no_run(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    found = {}
    for state in (
        *("plain", "no gradients", "inference", "autocast", "meta", "float64"),
        *("thread", "eval mode"),
    ):
        flags = tiny.flags(tmp_path / state, max_steps=2, dropout=0.2)
        (found[state],) = ranks(1, f"{WORK}:losses", flags=flags, state=state)
    assert len(found["plain"]) == 2
    assert {state: losses for state, losses in found.items() if losses != found["plain"]} == {}


def test_steps_that_are_none_and_one_after_the_end_are_refused(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (said,) = ranks(1, f"{WORK}:after_the_block", flags=tiny.flags(run, max_steps=3))
    assert [text.partition(" ")[0] for text in said] == [
        *("step(1.0)", "step(True)", "step(2)", "step(2)")
    ]
    assert "is not the next step" in said[2]
    assert "comes after the end of the block" in said[3]
    assert (run / "checkpoints" / "step_00000001").is_dir()
    assert not (run / "checkpoints" / "step_00000002").exists()
    assert '"why": ""' in (run / "attempts.jsonl").read_text()
