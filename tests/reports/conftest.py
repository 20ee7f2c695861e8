"""What several files of reports use."""

from typing import Any

import pytest

from sparse_lora_dist.runtime import entry_point


class Left(Exception):
    """In place of the end of the process."""


def statuses(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[int]:
    """Statuses with which a process would have left by the function ``name`` of ``place``."""
    found: list[int] = []

    def leave(code: int) -> None:
        found.append(code)
        raise Left

    monkeypatch.setattr(place, name, leave)
    monkeypatch.setattr(entry_point, "quiet_others", lambda: None)
    return found


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses with which run_program would have left."""
    return statuses(monkeypatch, entry_point, "exit_process")
