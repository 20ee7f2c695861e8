"""Suggestions for misspelt words in error messages."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 60
"""Longest word that a suggestion is looked for."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a suggestion for a misspelt word, to append to a message.

    Args:
        word: The word as the user wrote it.
        known: Words that are allowed.
        prefix: What to put before the suggested word, such as "--".

    Returns:
        Text like "; did you mean --rank?", or "" if no allowed word is similar.
    """
    if len(word) > LONGEST:  # comparing takes time that grows with the length
        return ""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
