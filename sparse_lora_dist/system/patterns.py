"""Match regular expressions that a user gives, such as --target_modules, within a bounded time.

A pattern with repetitions in repetitions, such as (a+)+b, can need more time than the universe has
for a name of 40 letters. Python's own ``re`` cannot be stopped; the package ``regex``, which
transformers needs too, reads the same patterns and can.
"""

import re
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import regex

from sparse_lora_dist.errors import UserError

LONGEST = 20_000
"""Largest number of letters of a pattern."""
MATCH_S = 5.0
"""Longest time in seconds that a pattern may take for all names of a model together. A usual one
takes milliseconds."""


def bad_regex(name: str, pattern: str) -> list[str]:
    """Return a message if the value of an option or a key is not a regular expression.

    Args:
        name: Name of the option, with its dashes, or of the key.
        pattern: Its value.

    Returns:
        A list with the message, or an empty list.
    """
    if len(pattern) > LONGEST:
        return [
            f"{name} is a pattern of {len(pattern)} letters, but at most {LONGEST} are read. Make "
            "it shorter"
        ]
    try:
        with warnings.catch_warnings():  # of a possible new meaning in a later Python
            warnings.simplefilter("ignore")
            re.compile(pattern)
            regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        return [
            f"{name} must be names or a regular expression, got {pattern[:200]!r}, which does not "
            f"compile: {error}"
        ]
    return []


@lru_cache(maxsize=4096)  # an adapter may have a pattern for each of its modules
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def matching(name: str, pattern: str, texts: Iterable[str]) -> list[str]:
    """Return the texts that a pattern matches from beginning to end.

    Args:
        name: Option or key that has the pattern, for the message.
        pattern: Regular expression that ``bad_regex`` has accepted.
        texts: Texts to match, e.g. names of modules.

    Raises:
        UserError: The pattern takes longer than ``MATCH_S`` for all texts together.
    """
    compiled, deadline = _compiled(pattern), time.monotonic() + MATCH_S
    try:
        return [
            text
            for text in texts
            if compiled.fullmatch(text, timeout=max(1e-3, deadline - time.monotonic()))
        ]
    except TimeoutError as error:
        raise UserError(
            f"{name} {pattern[:200]!r} takes longer than {MATCH_S:g} s to match. Write it without "
            "repetitions inside repetitions, such as (a+)+ or (.*)*, or name the modules."
        ) from error


def first_that_ends(name: str, patterns: Sequence[str], text: str) -> str | None:
    """Return the first pattern that matches the end of a module's name as PEFT matches it.

    PEFT lets a key of alpha_pattern match the whole name, or the part of it that follows a dot.

    Args:
        name: Key that has the patterns, for the message.
        patterns: Regular expressions that ``bad_regex`` has accepted.
        text: Name of a module.

    Raises:
        UserError: A pattern takes too long to match.
    """
    return next((p for p in patterns if matching(name, rf"(?:.*\.)?(?:{p})", [text])), None)
