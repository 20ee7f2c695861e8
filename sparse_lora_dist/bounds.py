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
