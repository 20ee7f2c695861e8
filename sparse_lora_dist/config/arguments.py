"""Read options from the command line and from a YAML file, without parsing their values.

``typed_values`` then parses the values. Every function appends a message to ``problems`` for each
mistake that it finds, and goes on, so that one error names them all.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from reprlib import Repr
from typing import get_args

from jsonargparse import ArgumentParser

from sparse_lora_dist.config.paths import PATHS, bad_path, expanded
from sparse_lora_dist.config.schema import (
    Option,
    describe,
    is_switch,
    items_of,
    may_be_null,
    takes_list,
    value_of,
)
from sparse_lora_dist.config.spelling import did_you_mean
from sparse_lora_dist.config.yaml_file import read_entries
from sparse_lora_dist.errors import MOST_PROBLEMS, UserError
from sparse_lora_dist.system.shipped import CONFIG

ACTIONS = {
    "config": "YAML file, or its name in configs/; flags override it.",
    "print_config": "Print the values of all options as YAML and exit.",
    "help": "Print the common options and exit; with a METHOD, its options.",
    "help_all": "Print all options and exit.",
}
"""{flag that is not an option of a run, because it names a file or prints something: its help
text}."""
LAUNCHER_FLAGS = ("local_rank", "local-rank")  # deepspeed and torchrun add them; unused here

DASHES = ("\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")
"""What word processors make of --."""
SMALLEST = 2.0**-126
"""Smallest number that fp32 holds with all its digits. Smaller ones become 0 on some devices."""
LARGEST = 2**63
"""Whole numbers must be smaller, positive or negative."""
SHORT = Repr()
"""How values are shown in messages."""
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 120
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 10

Flags = list[tuple[str, list[str]]]
"""Command line as [(flag without dashes, list of the words that follow it)], in the order given."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """One option that the user gave, with its value not yet parsed."""

    name: str
    value: object
    """A string from the command line, or the value that the YAML parser returned."""
    place: str
    """Where the user gave the value; messages about it begin with this, e.g. "--rank" or "run.yaml
    line 3: rank"."""


def split_argv(argv: Sequence[str], problems: list[str]) -> Flags:
    """Split a command line into flags and the words that follow each of them.

    ``--flag=value`` counts as the flag ``flag`` with one word. Flags that launchers add
    (``--local_rank``) are dropped.

    Args:
        argv: The words after the program's name.
        problems: List of messages. One is appended for each word that follows no flag.

    Returns:
        [(flag without dashes, list of the words that follow it)], in the order given.
    """
    chunks: Flags = []
    closed = True  # True before the first flag and after --flag=value: no word may follow
    for word in argv:
        if word.startswith("--") or word == "-h":
            name, equals, value = word[2:].partition("=")
            chunks.append(("help" if word == "-h" else name, [value] if equals else []))
            closed = bool(equals)
        elif closed:
            problems.append(f"{word!r} does not belong to an option. Write --option value")
        else:
            chunks[-1][1].append(word)
    return [(name, words) for name, words in chunks if name not in LAUNCHER_FLAGS]


def read_flags(flags: Flags, options: Mapping[str, Option], problems: list[str]) -> list[Given]:
    """Return the options among the flags, each with one value that is not yet parsed.

    A list becomes one comma-separated value, and a switch without a value becomes "true".

    Args:
        flags: Flags of the command line.
        options: All options of the program, by name.
        problems: List of messages. One is appended for each unknown flag and each wrong number of
            values.
    """
    given = []
    for name, words in flags:
        if name in ACTIONS:
            continue
        if name not in options:
            hint = _suggestion(name, [*options, *ACTIONS], problems, "--")
            problems.append(f"--{name} is not an option{hint}")
        elif takes_list(options[name].hint):
            given.append(Given(name=name, value=",".join(words), place=f"--{name}"))
        elif not words and is_switch(options[name].hint):
            given.append(Given(name=name, value="true", place=f"--{name}"))
        elif len(words) != 1:
            problems.append(f"--{name} takes one value, got {' '.join(words) or 'none'}")
        else:
            given.append(Given(name=name, value=words[0], place=f"--{name}"))
    return given


def given_again(flags: Flags) -> list[str]:
    """Return a note for each option that the command line gives several times with other values.

    Args:
        flags: Flags of the command line.
    """
    values: dict[str, list[str]] = {}
    for name, words in flags:
        values.setdefault(name, []).append(" ".join(words))
    return [
        f"--{name} was given {len(found)} times, and the last counts: {SHORT.repr(found[-1])}"
        for name, found in values.items()
        if len(set(found)) > 1
    ]


def read_yaml(flags: Flags, options: Mapping[str, Option], problems: list[str]) -> list[Given]:
    """Return the options in the YAML file of ``--config``, which has ``name: value`` lines.

    Args:
        flags: Flags of the command line. Without ``--config`` the result is empty.
        options: All options of the program, by name.
        problems: List of messages. One is appended if the file cannot be read, and one for each
            option that is unknown or set twice.
    """
    files = [words for name, words in flags if name == "config"]
    if not files:
        return []
    if len(files) > 1 or len(files[0]) != 1:
        problems.append("--config takes one YAML file. Give it once, with one file")
        return []
    given = Given(name="config", value=files[0][0], place="--config")
    if found := bad_words(given, given.value):
        problems += found
        return []
    path = CONFIG.find(expanded(files[0][0]))
    try:
        entries = read_entries(path, place=f"--config {path}")
    except UserError as error:
        missing = "" if os.path.exists(path) else f". {CONFIG.allowed()}"
        problems.append(f"{error}{missing}")
        return []
    if not entries:
        problems.append(
            f"--config {path} sets no option: it is empty or holds only comments. Write 'name: "
            "value' lines into it, or leave --config out for the defaults"
        )
    places: dict[str, str] = {}
    for entry in entries:
        place = f"{path} line {entry.line}"
        if entry.name in places:  # which of the two is meant cannot be known
            problems.append(
                f"{place}: {entry.name} is set twice, first at {places[entry.name]}. Remove one "
                "line"
            )
        elif entry.name not in options:
            hint = _suggestion(entry.name, options, problems)
            problems.append(f"{place}: {entry.name} is not an option{hint}")
        places[entry.name] = place
    return [
        Given(name=e.name, value=e.value, place=f"{path} line {e.line}: {e.name}")
        for e in entries
        if e.name in options
    ]


def _suggestion(word: str, known: Iterable[str], problems: list[str], prefix: str = "") -> str:
    """Return ``did_you_mean``, or "" if so many problems come before this one that it is not
    shown. Comparing a word with all options takes a millisecond."""
    return did_you_mean(word, known, prefix) if len(problems) < MOST_PROBLEMS else ""


def typed_values(
    given: Iterable[Given],
    options: Mapping[str, Option],
    parser: ArgumentParser,
    problems: list[str],
) -> dict[str, object]:
    """Parse the given values by the types of their options.

    Args:
        given: Options with their values not yet parsed. If one is given twice, the last value
            counts.
        options: All options of the program, by name.
        parser: Parser that knows the type of each option.
        problems: List of messages. One is appended for each value of a wrong type and each NaN or
            infinity.

    Returns:
        {option: parsed value}, without the options that have a problem.
    """
    values = {}
    for one in given:
        try:
            parsed = _parsed(one, options[one.name].hint, parser)
        except Exception:  # the parser and YAML raise a dozen types, none with words for a user
            hint = options[one.name].hint
            problems.append(
                f"{one.place} must be {describe(hint)}, got {short(one.value)}{_quotes(one, hint)}"
            )
            continue
        if found := bad_words(one, parsed):
            problems += found
        else:
            values[one.name] = _expanded(parsed) if one.name in PATHS else parsed
    return values


def _quotes(one: Given, hint: object) -> str:
    """Return the advice to quote a value that YAML reads as a number or as true, in place of the
    text that the option takes; otherwise ""."""
    kinds = (hint, *get_args(hint))
    is_word = str in kinds and isinstance(one.value, int | float)
    return f'. Put the text in quotes: {one.name}: "..."' if is_word else ""


def _parsed(one: Given, hint: object, parser: ArgumentParser) -> object:
    """Return the value of an option by its type; raise any exception if it has another type."""
    value = one.value
    if isinstance(value, str):
        value = value_of(value, hint)
    if isinstance(value, list):
        value = items_of(value, hint)
    # jsonargparse accepts None. Nobody has a file called null.
    if value in (None, "null") and not may_be_null(hint):
        raise TypeError
    parsed: object = value
    if not isinstance(value, str):  # of a text jsonargparse would try what it means in YAML 1.1
        parsed = parser.parse_object({one.name: value}, defaults=False)[one.name]
    if not is_finite(parsed):  # NaN passes range checks
        raise TypeError
    return parsed


def bad_words(one: Given, parsed: object) -> list[str]:
    """Return a message for each word of an option's value that is empty or cannot be a path, and
    for a number that no option takes.

    Args:
        one: The option as it was given.
        parsed: Its value: a number, text, or a list or tuple of these.
    """
    words = parsed if isinstance(parsed, list | tuple) else [parsed]
    problems = []
    if any(isinstance(word, str) and not word.strip() for word in (one.value, *words)):
        problems.append(
            f"{one.place} is empty. Give a value, or leave the option out. (A shell variable that "
            "is not set gives an empty word.)"
        )
    for word in words:
        if isinstance(word, int) and abs(word) >= LARGEST:
            problems.append(f"{one.place} must be below 2^63, got {short(word)}")
        if isinstance(word, float) and word and not SMALLEST <= abs(word) < 2.0**128:
            problems.append(
                f"{one.place} must be 0 or a number that fp32 holds, from 1.2e-38 to 3.4e38 in "
                f"size, got {word}"
            )
        if isinstance(word, str) and word[:1] in DASHES and word[1:2].isalpha():
            problems.append(
                f"{one.place}: {word} begins with a dash of a word processor. Options begin with --"
            )
        if isinstance(word, str) and one.name in PATHS:
            problems += bad_path(one.place, word)
    return problems


def _expanded(value: object) -> object:
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    return expanded(value) if isinstance(value, str) else value


def short(value: object) -> str:
    """Return the ``repr`` of a value for a message; the middle of a long one is left out."""
    return SHORT.repr(value)


def is_finite(value: object) -> bool:
    """Return False if ``value`` is NaN or infinite, or a list or tuple with such an item; otherwise
    True."""
    items = value if isinstance(value, list | tuple) else [value]
    return all(isfinite(item) for item in items if isinstance(item, float))
