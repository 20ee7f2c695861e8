"""The tests of ``make smoke``: a law of every method, resume, export, a launcher; about sixty."""

from fnmatch import fnmatch

SMOKE = ("training/test_laws.py::test_stopping_before_at_and_after_decisions_changes_no_bit*",)
"""Patterns of test ids, after ``tests/``."""


def is_smoke(test_id: str) -> bool:
    """Is the test one of these? A bracket of a test id stands for itself."""
    name = test_id.removeprefix("tests/").replace("[", "(").replace("]", ")")
    return any(fnmatch(name, pattern.replace("[", "(").replace("]", ")")) for pattern in SMOKE)
