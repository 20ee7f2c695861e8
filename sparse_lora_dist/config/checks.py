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
        part: Object with the options as attributes. An option that is None passes.
        bound: Smallest value allowed.
        names: Names of the options to check.
    """
    numbers = {name: getattr(part, name) for name in names}
    return [
        f"--{name} must be at least {bound}, got {value}"
        for name, value in numbers.items()
        if value is not None and not bound <= value < math.inf
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


def bad_regex(name: str, pattern: str) -> list[str]:
    """Return a message if the value of an option or a key is not a regular expression.

    Args:
        name: Name of the option, with its dashes, or of the key.
        pattern: Its value.

    Returns:
        A list with the message, or an empty list.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        return [
            f"{name} must be names or a regular expression, got {pattern!r}, which does not "
            f"compile: {error}"
        ]
    return []


DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
CLOCK = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_in(text: str) -> float:
    """Return the seconds in a duration.

    Args:
        text: A duration such as "90s", "30m" or "1.5h", or in Slurm's format: "5:30"
            (minutes:seconds), "2:00:00" (hours:minutes:seconds) or "1-12:00:00"
            (days-hours:minutes:seconds).

    Raises:
        ValueError: ``text`` is not a duration.
    """
    if found := DURATION.fullmatch(text.strip()):
        return float(found[1]) * SECONDS[found[2]]
    if found := CLOCK.fullmatch(text.strip()):
        days, hours, minutes, seconds = (int(n or 0) for n in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise ValueError(f"a duration is written like 90s, 30m, 2h or 1-12:00:00, got {text!r}")


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
            if text is not None and seconds_in(text) < least_s:
                problems.append(f"--{name} must be at least {least_s:g}s, got {text}")
        except ValueError as error:
            problems.append(f"--{name} must be a duration: {error}")
    return problems
