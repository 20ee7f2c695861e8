"""Checks whether a generated text is the right answer."""

import re
from collections.abc import Sequence
from decimal import Decimal

NUMBER = re.compile(r"(?<![^\W_])-?\$?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.\d+|\d+)")
"""Matches 18, -3, $1,234.50 and .5; in "16-3" it matches 16 and 3."""
PART_BEFORE = re.compile(
    r"(?:\d(?:[^\S\n]+|[^\w\s=]|[^\S\n]*[-+*/^×÷·][^\S\n]*)|\d[eE][-+]|[√^/])\Z"  # noqa: RUF001
)
"""Matches a text of which the number that follows is only a part: "1/", "10:", "1 ", "3 - "."""
PART_AFTER = re.compile(
    r"[^\W_]|[^\S\n]*[/^]|[^\S\n]+(?:hundred|thousand|million|billion|trillion|dozen)s?\b", re.I
)
"""Matches a text that makes the number before it another one: "e3", "k", "/x", " million"."""
LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:,]|\s*$|\s*\n|\s+is\b)")
"""Matches a letter at the start of a text: "A.", "(B)", "c:", "A is", or a line of one letter."""
ANSWER_LETTER = re.compile(r"\b(?i:answer|option|choice)\b(?:\s+is\b)?\s*:?\s*\(?([A-Z])(?![\w'])")
"""Matches "The answer is B" and "Option C"."""
MARKUP = re.compile(r"[*_`\"]")
"""Characters of Markdown emphasis, and quotes."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Labels of the choices of a question, in their order."""


def normalized(text: str) -> str:
    """Return a text in lower case (case-folded), with single spaces between words."""
    return " ".join(text.split()).casefold()


def is_exact(text: str, answer: str) -> bool:
    """Return True if two texts are equal, ignoring case and amounts of white space.

    Args:
        text: The generated text.
        answer: The right answer.
    """
    return normalized(text) == normalized(answer)


def final_number(text: str) -> Decimal | None:
    """Return the number that a text gives as its answer; None if it has none.

    That is the first number after the last "####", GSM8K's answer mark. Without the mark it is the
    last number of the text.
    """
    _, mark, marked = re.sub("[−–]", "-", text).rpartition("####")  # noqa: RUF001  minus, dash
    found = list(NUMBER.finditer(marked))
    if not found:
        return None
    match = found[0] if mark else found[-1]
    number = Decimal(match[1].replace(",", ""))
    return -number if match[0].startswith("-") else number


def reference_number(text: str) -> Decimal | None:
    """Return the final number of a right answer; None if it is not plain, so that a generated text
    would be compared with a part of it.

    Such are 1/2, 10:30, 1e3, 2^10, 1 000, 3k, 2 million, and two numbers after "####".
    """
    _, mark, marked = text.rpartition("####")
    found = list(NUMBER.finditer(marked))
    if not found:
        return None
    one = found[0] if mark else found[-1]
    before, after = marked[: one.start()], marked[one.end() :]
    rest = after.partition("\n")[0]
    if PART_BEFORE.search(before) or PART_AFTER.match(after) or NUMBER.search(rest):
        return None
    return final_number(text)


def is_same_number(text: str, answer: str) -> bool:
    """Return True if the final numbers of two texts have the same value: 18.00 equals 18.

    A text without a number equals no other. ``final_number`` defines the final number.

    Args:
        text: The generated text.
        answer: The right answer.
    """
    number = final_number(text)
    return number is not None and number == final_number(answer)


def chosen_index(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that a generated text names; None if it names none.

    The first rule that fits decides:

    1. The text begins with a choice; the longest, if it begins with several.
    2. The text names a letter: "B." at its start, or "the answer is B".
    3. The text contains a choice; the first one, or the longest if several start there.

    Case, white space, Markdown emphasis and quotes are ignored.

    Args:
        text: The generated text.
        choices: Texts of the choices. Their letters are A, B, C, ... in this order.
    """
    text = MARKUP.sub("", text).strip()
    plain, wanted = normalized(text), [normalized(MARKUP.sub("", choice)) for choice in choices]
    begins = [i for i, choice in enumerate(wanted) if _find_words(plain, choice) == 0]
    if begins:
        return max(begins, key=lambda i: len(wanted[i]))
    for letter in filter(None, (LETTER.match(text), ANSWER_LETTER.search(text))):
        index = LETTERS.index(letter[1].upper())
        if index < len(choices):
            return index
    named = [i for i, choice in enumerate(wanted) if _find_words(plain, choice) is not None]
    return min(named, key=lambda i: (_find_words(plain, wanted[i]), -len(wanted[i])), default=None)


def _find_words(text: str, words: str) -> int | None:
    """Return the first position of ``words`` in ``text`` as whole words; None if not found."""
    # So "3" is found neither in "-3" nor in "3.5".
    pattern = rf"(?<![\w.-]){re.escape(words)}(?!\w|[.,]\d)"
    found = re.search(pattern, text) if words else None
    return found.start() if found else None
