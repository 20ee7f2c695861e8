"""Checks of option values: each returns a list of problems, one line per problem."""

import math
import re

from sparse_lora_dist.errors import ConfigError


def raise_if(problems: list[str]) -> None:
    """Raise a ConfigError with all problems; do nothing if there are none."""
    if problems:
        raise ConfigError(problems)


def at_least(part: object, bound: float, *names: str) -> list[str]:
    """Check numbers against an inclusive lower bound.

    Args:
        part: object with the options as attributes.
        bound: smallest value allowed. None and larger finite numbers pass.
        names: names of the attributes to check.

    Returns:
        One problem per attribute that is smaller or not finite.
    """
    numbers = {name: getattr(part, name) for name in names}
    return [
        f"{name} must be at least {bound}, got {value}"
        for name, value in numbers.items()
        if value is not None and not bound <= value < math.inf
    ]


def above(part: object, bound: float, *names: str) -> list[str]:
    """Check numbers against an exclusive lower bound.

    Args:
        part: object with the options as attributes.
        bound: finite numbers above it pass.
        names: names of the attributes to check.

    Returns:
        One problem per attribute that is not above ``bound`` or not finite.
    """
    numbers = {name: getattr(part, name) for name in names}
    return [
        f"{name} must be above {bound}, got {value}"
        for name, value in numbers.items()
        if not bound < value < math.inf
    ]


def bad_regex(name: str, pattern: str) -> list[str]:
    """Check a regular expression.

    Returns:
        A list with one problem if ``pattern`` does not compile, or an empty list.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name} is neither names nor a regular expression: {pattern!r} ({error})"]
    return []


DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
CLOCK = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_in(text: str) -> float:
    """Parse a duration.

    Args:
        text: such as "90s", "30m" or "1.5h", or as Slurm writes it: "5:30" (minutes:seconds),
            "2:00:00", "1-12:00:00" (days-hours:minutes:seconds).

    Returns:
        Seconds.

    Raises:
        ValueError: ``text`` is not a duration.
    """
    if found := DURATION.fullmatch(text.strip()):
        return float(found[1]) * SECONDS[found[2]]
    if found := CLOCK.fullmatch(text.strip()):
        days, hours, minutes, seconds = (int(n or 0) for n in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise ValueError(f"{text!r} is not a duration like 90s, 30m, 2h or 1-12:00:00")


def bad_durations(part: object, *names: str, least_s: float = 1.0) -> list[str]:
    """Return a problem per named attribute that is not a duration or too short; None passes."""
    problems = []
    for name in names:
        text = getattr(part, name)
        try:
            if text is not None and seconds_in(text) < least_s:
                problems.append(f"{name} must be at least {least_s:g}s, got {text}")
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return problems
