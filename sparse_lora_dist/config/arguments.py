"""Read options from the command line and from a YAML file, without parsing their values.

``typed_values`` then parses the values. Every function appends a message to ``problems`` for each
mistake that it finds, and goes on, so that one error names them all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from sparse_lora_dist.config.schema import (
    Option,
    describe,
    is_switch,
    items_in,
    may_be_null,
    takes_list,
)
from sparse_lora_dist.config.spelling import did_you_mean

ACTIONS = {
    "config": "YAML file of options; flags override its values.",
    "print_config": "Print the values of all options as YAML and exit.",
    "help": "Print the common options and exit; with a METHOD, its options.",
    "help_all": "Print all options and exit.",
}
"""{flag that is not an option of a run, because it names a file or prints something: its help
text}."""
LAUNCHER_FLAGS = ("local_rank", "local-rank")  # deepspeed and torchrun add them; unused here

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
            name, equals, value = word.lstrip("-").partition("=")
            chunks.append(("help" if name == "h" else name, [value] if equals else []))
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
            problems.append(
                f"--{name} is not an option{did_you_mean(name, [*options, *ACTIONS], '--')}"
            )
        elif takes_list(options[name].hint):
            given.append(Given(name=name, value=",".join(words), place=f"--{name}"))
        elif not words and is_switch(options[name].hint):
            given.append(Given(name=name, value="true", place=f"--{name}"))
        elif len(words) != 1:
            problems.append(f"--{name} takes one value, got {' '.join(words) or 'none'}")
        else:
            given.append(Given(name=name, value=words[0], place=f"--{name}"))
    return given


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
    (path,) = files[0]
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}")
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        held = "a list" if isinstance(root, yaml.SequenceNode) else "one value"
        problems.append(f"{path} must hold 'name: value' lines, but holds {held}")
        return []
    places: dict[str, str] = {}
    for key, _ in root.value:
        place = f"{path} line {key.start_mark.line + 1}"
        if key.value in places:  # the YAML parser would silently take the last one
            problems.append(
                f"{place}: {key.value} is set twice, first at {places[key.value]}. Remove one line"
            )
        elif key.value not in options:
            problems.append(
                f"{place}: {key.value} is not an option{did_you_mean(key.value, options)}"
            )
        places[key.value] = place
    return [
        Given(name=name, value=content[name], place=f"{place}: {name}")
        for name, place in places.items()
        if name in options
    ]


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
        hint = options[one.name].hint
        value = one.value
        if isinstance(value, str) and takes_list(hint):
            value = items_in(value, hint)
        try:
            if value is None and not may_be_null(hint):  # jsonargparse accepts it
                raise TypeError
            parsed = parser.parse_object({one.name: value}, defaults=False)[one.name]
            if not is_finite(parsed):  # NaN passes range checks
                raise TypeError
            values[one.name] = parsed
        except (ArgumentError, TypeError):
            # Not the parser's own message: it names Python classes.
            problems.append(f"{one.place} must be {describe(hint)}, got {one.value!r}")
    return values


def is_finite(value: object) -> bool:
    """Return False if ``value`` is NaN or infinite, or a list or tuple with such an item; otherwise
    True."""
    items = value if isinstance(value, list | tuple) else [value]
    return all(isfinite(item) for item in items if isinstance(item, float))
