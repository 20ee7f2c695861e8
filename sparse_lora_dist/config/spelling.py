"""Suggestions for misspelt words in error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Suggest a known word.

    Args:
        word: the word as the user wrote it.
        known: words that are allowed.
        prefix: what to put before the suggestion, such as "--".

    Returns:
        Text to append to a message, like "; did you mean rank?"; empty if no word is near.
    """
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
