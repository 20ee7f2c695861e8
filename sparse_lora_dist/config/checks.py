"""Checks of option values. Each check returns a list of messages, one per problem, empty if all is
right."""

import math
import re

from sparse_lora_dist.errors import ConfigError


def raise_if(problems: list[str]) -> None:
    """Raise a ConfigError with all messages in ``problems``; do nothing if the list is empty."""
    if problems:
        raise ConfigError(problems)


def at_least(part: object, bound: float, *names: str) -> list[str]:
    """Return a message for each number that is below a bound or not finite.

    Args:
        part: Object with the options as attributes. An option that is None passes; null is named
            as a value if it is the default.
        bound: Smallest value allowed.
        names: Names of the options to check.
    """
    numbers = {name: getattr(part, name) for name in names}
    or_null = {name: " or null" for name in names if getattr(type(part), name, "") is None}
    return [
        f"--{name} must be at least {bound}{or_null.get(name, '')}, got {value}"
        for name, value in numbers.items()
        if value is not None and not bound <= value < math.inf
    ]


def at_most(part: object, bound: float, *names: str) -> list[str]:
    """Return a message for each number that is above a bound.

    Args:
        part: Object with the options as attributes. An option that is None passes.
        bound: Largest value allowed.
        names: Names of the options to check.
    """
    numbers = {name: getattr(part, name) for name in names}
    return [
        f"--{name} must be at most {bound}, got {value}"
        for name, value in numbers.items()
        if value is not None and value > bound
    ]


def above(part: object, bound: float, *names: str) -> list[str]:
    """Return a message for each number that is not above a bound or not finite.

    Args:
        part: Object with the options as attributes.
        bound: Largest value that is not allowed.
        names: Names of the options to check.
    """
    numbers = {name: getattr(part, name) for name in names}
    return [
        f"--{name} must be above {bound}, got {value}"
        for name, value in numbers.items()
        if not bound < value < math.inf
    ]


DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
CLOCK = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
LONGEST_S = 366 * 86400.0
"""Longest duration in seconds. torch cannot count much longer ones."""
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_in(text: str) -> float:
    """Return the seconds in a duration.

    Args:
        text: A duration such as "90s", "30m" or "1.5h", or in Slurm's format: "5:30"
            (minutes:seconds), "2:00:00" (hours:minutes:seconds) or "1-12:00:00"
            (days-hours:minutes:seconds).

    Raises:
        ValueError: ``text`` is not a duration, or has 24 hours, 60 minutes or 60 seconds or more
            in a part that is not its first.
    """
    if found := DURATION.fullmatch(text.strip()):
        return float(found[1]) * SECONDS[found[2]]
    if found := CLOCK.fullmatch(text.strip()):
        days, hours, minutes, seconds = (float(n or 0) for n in found.groups())
        # The first part may be any number, as for Slurm: 90:00 is 90 minutes.
        limits = (found[1] and hours >= 24, found[2] and minutes >= 60, seconds >= 60)
        if any(limits):
            raise ValueError(
                f"it is read as minutes:seconds or hours:minutes:seconds, and the parts after the "
                f"first must be below 60 (hours after days below 24), got {text[:40]!r}. Write "
                "e.g. 90m or 1:30:00"
            )
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    raise ValueError(f"a duration is written like 90s, 30m, 2h or 1-12:00:00, got {text[:40]!r}")


def bad_durations(part: object, *names: str, least_s: float = 1.0) -> list[str]:
    """Return a message for each option that is not a duration or is too short.

    Args:
        part: Object with the options as attributes. An option that is None passes.
        names: Names of the options to check.
        least_s: Shortest duration allowed, in seconds.
    """
    problems = []
    for name in names:
        text = getattr(part, name)
        try:
            seconds = least_s if text is None else seconds_in(text)
            if seconds < least_s:
                problems.append(f"--{name} must be at least {least_s:g}s, got {text}")
            if seconds > LONGEST_S:
                problems.append(f"--{name} must be at most 366 days (8784h), got {text[:40]}")
        except ValueError as error:
            problems.append(f"--{name} must be a duration: {error}")
    return problems
