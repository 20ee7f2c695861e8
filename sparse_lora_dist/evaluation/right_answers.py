"""Checks whether a generated text is the right answer."""

import re
from collections.abc import Sequence
from decimal import Decimal
from unicodedata import category, normalize

NUMBER = re.compile(r"(?<![^\W_])-?\$?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.\d+|\d+)")
"""Matches 18, -3, $1,234.50 and .5; in "16-3" it matches 16 and 3."""
PART_BEFORE = re.compile(
    r"(?:\d(?:[^\S\n]+|[^\w\s=]|[^\S\n]*[-+*/^×÷·][^\S\n]*)|\d[eE][-+]|[√^/]"  # noqa: RUF001
    r"|[^\W_](?:_|[^\S\n]*[+×÷·][^\S\n]*)|[^\W\d_][-(\[]|(?:[{}]|\\[A-Za-z]+)[^\S\n]*)\Z"  # noqa: RUF001
)
r"""Matches a text of which the number that follows is only a part: "1/", "10:", "1 ", "3 - ", "x+",
"sqrt(", "\frac{", "\cdot "."""
PART_AFTER = re.compile(
    r"[^\W_]|[^\S\n]*[/^\\+×÷·]|\.\\|_[^\W_]|_\{"  # noqa: RUF001
    r"|[^\S\n]+(?:hundred|thousand|million|billion|trillion|dozen)s?\b",
    re.I,
)
r"""Matches a text that makes the number before it another one: "e3", "k", "/x", "\pi",
" million"."""
COMMA = re.compile(r"\{,\}|,\\!")
"""Matches the comma of 1,000 as LaTeX writes it."""
WORDS = re.compile(r"\\(?:text|math[a-z]|mbox)[a-z]*\s*\{([^{}]*)\}")
"""Matches text or a number in another font, in LaTeX."""
BLANK = re.compile(r"~|\\(?:[,;:! ()\[\]\\]|(?:begin|end)\{[a-z]+\*?\}|q?quad(?![A-Za-z]))")
"""Matches what LaTeX shows as white space, and its marks around formulas."""
EQUALS = re.compile(r"\\(?:approx|implies|therefore|[Rr]ightarrow)(?![A-Za-z])")
"""Matches what stands before a result in LaTeX, as = does."""
BOXED = re.compile(rf"\s*(?:[^\W\d]+\s*=)?\s*{NUMBER.pattern}\s*%?[^\W\d]*(?:[^\S\n]+[^\W\d]+)*\s*")
"""Matches a number alone, with a name before it or a unit after it: x = 5, 5%, 5 apples."""
NOT = r"(?!\s+(?i:isn't|wasn't|(?:is|was)\s+(?:not|wrong|incorrect|false))\b)"
"""Does not match before what says that a letter is not the answer."""
LETTER = re.compile(rf"[(\[]?([A-Za-z]){NOT}(?:[)\].:,]|\s*$|\s*\n|\s+(?i:is)\b)")
"""Matches a letter at the start of a text: "A.", "(B)", "c:", "A is", or a line of one letter."""
AFTER_WORD = rf"(?:\s+(?:is|I[Ss](?!\s+[AI]\s+\w))\b)?\s*:?\s*[(\[]?([A-Z])(?![\w'#+]){NOT}"
ANSWER_LETTER = re.compile(rf"\b(?i:answer)\b{AFTER_WORD}")
"""Matches "The answer is B" and "ANSWER IS B", but not "ANSWER IS A DOG"."""
SMALL_LETTER = re.compile(
    r"\b(?i:answer)\s+is\s*:?\s*[(\[]?([b-hj-z])[)\]]?\s*(?:[.!]?\s*$|\.?\s*\n)"
)
"""Matches "the answer is d." at the end of a line, but neither "a" nor "i", which are words."""
OPTION_LETTER = re.compile(rf"\b(?i:option|choice)\b{AFTER_WORD}")
"""Matches "Option C", but not "Option C is wrong"."""
BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}|\$+|\\[()\[\]]")
"""Matches a box of LaTeX, and marks around formulas."""
QUOTED_LETTER = re.compile(r"(?<!\w)['‘]([A-Za-z])['’](?!\w)")  # noqa: RUF001
MARKUP = re.compile(r"[*_`\"]")
"""Characters of Markdown emphasis, and quotes."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Labels of the choices of a question, in their order."""


def normalized(text: str) -> str:
    """Return a text in lower case (case-folded), with single spaces between words, and with each
    letter and its accents as one character where Unicode has one."""
    return normalize("NFC", " ".join(text.split()).casefold())


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
    last number of the text. A thousand may be 1,000 or LaTeX's 1{,}000.
    """
    text = COMMA.sub(",", re.sub("[−–]", "-", text))  # noqa: RUF001  minus, dash
    _, mark, marked = text.rpartition("####")
    found = list(NUMBER.finditer(marked))
    if not found:
        return None
    match = found[0] if mark else found[-1]
    number = Decimal(match[1].replace(",", ""))
    return -number if match[0].startswith("-") else number


def reference_number(text: str) -> Decimal | None:
    """Return the final number of a right answer; None if it is not plain, so that a generated text
    would be compared with a part of it.

    Such are 1/2, 10:30, 1e3, 2^10, 1 000, 3k, 2 million, and two numbers after "####". So are
    formulas of LaTeX, such as fractions and roots, and a box that holds more than a number.
    """
    plain = _without_latex(text)
    if plain is None:
        return None
    _, mark, marked = plain.rpartition("####")
    found = list(NUMBER.finditer(marked))
    if not found:
        return None
    one = found[0] if mark else found[-1]
    before, after = marked[: one.start()], marked[one.end() :]
    rest = after.partition("\n")[0]
    if PART_BEFORE.search(before) or PART_AFTER.match(after) or NUMBER.search(rest):
        return None
    number = final_number(text)
    return number if number == final_number(plain) else None


def _without_latex(text: str) -> str | None:
    """Return a text without those marks of LaTeX that change no number; None if its last box holds
    more than a number, or a number follows the box."""
    text = COMMA.sub(",", text).replace("\\$", "$").replace("\\%", "%")
    while (inner := WORDS.sub(r"\1", text)) != text:
        text = inner
    text = EQUALS.sub("=", BLANK.sub(" ", text))
    before, box, rest = text.rpartition("\\boxed{")
    if not box:
        return text
    content, _, after = rest.partition("}")
    is_plain = BOXED.fullmatch(content) and not NUMBER.search(after)
    return before + content + after if is_plain else None


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
    2. The text names a letter: "B." at its start, "the answer is B", or "option B"; also in a box
       of LaTeX.
    3. The text contains a choice; the first one, or the longest if several start there.

    Case, white space, Markdown emphasis and quotes are ignored.

    Args:
        text: The generated text.
        choices: Texts of the choices. Their letters are A, B, C, ... in this order.
    """
    text = normalize("NFC", MARKUP.sub("", text).strip())
    plain, wanted = normalized(text), [normalized(MARKUP.sub("", choice)) for choice in choices]
    begins = [i for i, choice in enumerate(wanted) if _find_words(plain, choice) == 0]
    if begins:
        return max(begins, key=lambda i: len(wanted[i]))
    letters = _without_marks(text)
    patterns = (LETTER.match, ANSWER_LETTER.search, SMALL_LETTER.search, OPTION_LETTER.search)
    for letter in filter(None, (pattern(letters) for pattern in patterns)):
        index = LETTERS.index(letter[1].upper())
        if index < len(choices):
            return index
    named = [i for i, choice in enumerate(wanted) if _find_words(plain, choice) is not None]
    return min(named, key=lambda i: (_find_words(plain, wanted[i]), -len(wanted[i])), default=None)


def _without_marks(text: str) -> str:
    """Return a text without boxes, fonts and formula marks of LaTeX, and quotes of one letter."""
    while (inner := WORDS.sub(r"\1", text)) != text:
        text = inner
    return QUOTED_LETTER.sub(r"\1", BOX.sub(lambda mark: mark[1] or "", text)).strip()


def _find_words(text: str, words: str) -> int | None:
    """Return the first position of ``words`` in ``text`` as whole words; None if not found."""
    # So "3" is found neither in "-3" nor in "3.5".
    pattern = rf"(?<![\w.-]){re.escape(words)}(?!\w|[.,]\d)"
    found = re.finditer(pattern, text) if words else ()
    places = (one.span() for one in found)
    is_whole = (
        (start, not any(map(_is_accent, text[max(0, start - 1) : start] + text[stop : stop + 1])))
        for start, stop in places
    )
    return next((start for start, whole in is_whole if whole), None)


def _is_accent(character: str) -> bool:
    """Return True if a character belongs to the letter before it, as accents and the vowels of
    Hindi do, which \\w does not match. Selectors of a form, as emojis have them, do not count."""
    return category(character).startswith("M") and not "\ufe00" <= character <= "\ufe0f"
