"""What is wrong with options, a line each, and the error that says all of it."""

import math
import re

from sparse_lora_dist.errors import ConfigError


def raise_if(problems: list[str]) -> None:
    """Raises ConfigError when there are problems."""
    if problems:
        raise ConfigError(problems)


def at_least(part: object, bound: float, *names: str) -> list[str]:
    """A line for each named number of ``part`` below ``bound`` or not finite; None passes."""
    numbers = {name: getattr(part, name) for name in names}
    return [
        f"{name} must be at least {bound}, got {value}"
        for name, value in numbers.items()
        if value is not None and not bound <= value < math.inf
    ]


def above(part: object, bound: float, *names: str) -> list[str]:
    """A line for each named number of ``part`` not above ``bound`` or not finite."""
    numbers = {name: getattr(part, name) for name in names}
    return [
        f"{name} must be above {bound}, got {value}"
        for name, value in numbers.items()
        if not bound < value < math.inf
    ]


def bad_regex(name: str, pattern: str) -> list[str]:
    """A line when ``pattern`` is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name} is neither names nor a regular expression: {pattern!r} ({error})"]
    return []


DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
CLOCK = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_in(text: str) -> float | None:
    """Of "90s", "30m", "1.5h", or Slurm's "5:30", "2:00:00", "1-12:00:00"; None for what is no
    duration."""
    if found := DURATION.fullmatch(text.strip()):
        return float(found[1]) * SECONDS[found[2]]
    if found := CLOCK.fullmatch(text.strip()):
        days, hours, minutes, seconds = (int(n or 0) for n in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    return None


def bad_duration(name: str, text: str | None) -> list[str]:
    """A line when ``text`` is no duration above zero; None passes."""
    if text is None or seconds_in(text):
        return []
    return [f"{name} must be a duration like 90s, 30m, 2h or 1-12:00:00, got {text!r}"]
