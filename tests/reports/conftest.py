"""What several files of reports use."""

import pytest

from sparse_lora_dist.runtime import entry_point


class Left(Exception):
    """In place of the end of the process."""


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses with which run_program would have left."""
    found: list[int] = []

    def leave(code: int) -> None:
        found.append(code)
        raise Left

    monkeypatch.setattr(entry_point, "exit_process", leave)
    monkeypatch.setattr(entry_point, "quiet_others", lambda: None)
    return found
