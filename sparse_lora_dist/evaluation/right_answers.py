"""Is a generated text the right answer? Text in, true or false out."""

import re
from collections.abc import Sequence
from decimal import Decimal

NUMBER = re.compile(r"(?<![^\W_])-?\$?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.\d+|\d+)")
"""18, -3, $1,234.50, .5; in 16-3 the two are 16 and 3."""
LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:,]|\s*$|\s*\n|\s+is\b)")
"""A. or (B) or c: at the start, or a letter alone."""
CALLED = re.compile(r"\b(?i:answer|option|choice)\b(?:\s+is\b)?\s*:?\s*\(?([A-Z])(?![\w'])")
"""The answer is B; Option C."""
MARKS = re.compile(r"[*_`\"]")
"""Of emphasis, and quotes."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plain(text: str) -> str:
    """Without case, and with single spaces between words."""
    return " ".join(text.split()).casefold()


def is_exact(text: str, answer: str) -> bool:
    """Equal but for case and white space."""
    return plain(text) == plain(answer)


def final_number(text: str) -> Decimal | None:
    """The first number after the last ####, which is how GSM8K marks an answer, or the last one."""
    _, mark, marked = re.sub("[−–]", "-", text).rpartition("####")  # noqa: RUF001  minus, dash
    found = list(NUMBER.finditer(marked))
    if not found:
        return None
    match = found[0] if mark else found[-1]
    number = Decimal(match[1].replace(",", ""))
    return -number if match[0].startswith("-") else number


def is_same_number(text: str, answer: str) -> bool:
    """Is the text's final number the answer's? 18.00 is 18."""
    number = final_number(text)
    return number is not None and number == final_number(answer)


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Which choice the text takes: the one it begins with, else its letter (B. at the start, or
    "the answer is B"), else the one that it names first. Of those that begin alike, the longest."""
    text = MARKS.sub("", text).strip()
    said, wanted = plain(text), [plain(MARKS.sub("", choice)) for choice in choices]
    begins = [i for i, choice in enumerate(wanted) if _at(said, choice) == 0]
    if begins:
        return max(begins, key=lambda i: len(wanted[i]))
    for letter in filter(None, (LETTER.match(text), CALLED.search(text))):
        place = LETTERS.index(letter[1].upper())
        if place < len(choices):
            return place
    named = [i for i, choice in enumerate(wanted) if _at(said, choice) is not None]
    return min(named, key=lambda i: (_at(said, wanted[i]), -len(wanted[i])), default=None)


def _at(text: str, words: str) -> int | None:
    """Where ``words`` stand in ``text`` as whole words."""
    # 3 is not in -3, nor in 3.5.
    pattern = rf"(?<![\w.-]){re.escape(words)}(?!\w|[.,]\d)"
    found = re.search(pattern, text) if words else None
    return found.start() if found else None
