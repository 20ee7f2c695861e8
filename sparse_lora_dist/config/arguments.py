"""What the user gave: flags and YAML keys, each with the place to name when it is wrong.

Every function adds what it finds wrong to ``problems`` and goes on, so that all is told at once.
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

ACTIONS = ("config", "print_config", "help", "help_all")
LAUNCHER_FLAGS = ("local_rank", "local-rank")  # added by deepspeed and torchrun; we read LOCAL_RANK

Flags = list[tuple[str, list[str]]]
"""[(flag without dashes, the words after it)] in the order given."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """One option and its value as written."""

    name: str
    value: object
    place: str


def split_argv(argv: Sequence[str], problems: list[str]) -> Flags:
    """The flags and their words; those that only a launcher reads are left out."""
    chunks: Flags = []
    closed = True  # after --flag=value no further word belongs to the flag
    for word in argv:
        if word.startswith("--") or word == "-h":
            name, equals, value = word.lstrip("-").partition("=")
            chunks.append(("help" if name == "h" else name, [value] if equals else []))
            closed = bool(equals)
        elif closed:
            problems.append(f"{word!r} belongs to no option; write --option value")
        else:
            chunks[-1][1].append(word)
    return [(name, words) for name, words in chunks if name not in LAUNCHER_FLAGS]


def read_flags(flags: Flags, options: Mapping[str, Option], problems: list[str]) -> list[Given]:
    """The options among the flags, each with one value."""
    given = []
    for name, words in flags:
        if name in ACTIONS:
            continue
        if name not in options:
            problems.append(
                f"--{name} is no option{did_you_mean(name, [*options, *ACTIONS], '--')}"
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
    """The options in the YAML file of ``--config``, a flat list of ``name: value`` lines."""
    files = [words for name, words in flags if name == "config"]
    if not files:
        return []
    if len(files) > 1 or len(files[0]) != 1:
        problems.append("--config takes one file")
        return []
    (path,) = files[0]
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"--config {path} cannot be read: {' '.join(str(error).split())}")
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{path} must hold 'name: value' lines, got a {root.tag.split(':')[-1]}")
        return []
    places: dict[str, str] = {}
    for key, _ in root.value:
        place = f"{path} line {key.start_mark.line + 1}"
        if key.value in places:  # YAML would silently take the last one
            problems.append(f"{place}: {key.value} stands twice, first at {places[key.value]}")
        elif key.value not in options:
            problems.append(f"{place}: {key.value} is no option{did_you_mean(key.value, options)}")
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
    """{name: value of the option's type}; of an option given twice the later one counts."""
    values = {}
    for one in given:
        hint = options[one.name].hint
        value = one.value
        if isinstance(value, str) and takes_list(hint):
            value = items_in(value, hint)
        try:
            if value is None and not may_be_null(hint):  # the parser lets it pass
                raise TypeError
            parsed = parser.parse_object({one.name: value}, defaults=False)[one.name]
            if not is_finite(parsed):  # the checks of ranges let NaN pass
                raise TypeError
            values[one.name] = parsed
        except (ArgumentError, TypeError):
            # The parser's own text names Python classes.
            problems.append(f"{one.place} must be {describe(hint)}, got {one.value!r}")
    return values


def is_finite(value: object) -> bool:
    """Is every number in ``value`` finite?"""
    items = value if isinstance(value, list | tuple) else [value]
    return all(isfinite(item) for item in items if isinstance(item, float))
