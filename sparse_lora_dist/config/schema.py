"""Types, defaults, sections and help texts of all options, and the parser for their values."""

import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from sparse_lora_dist import methods
from sparse_lora_dist.config.config import SECTIONS

USAGE = "deepspeed launcher/train.py --ds_config ds_configs/zero3.json [--option value ...]"
COMMON = """
    model task precision gradient_checkpointing data eval_data prompt_field response_field
    sequence_length method rank alpha dropout target_modules max_steps num_epochs micro_batch_size
    gradient_accumulation_steps learning_rate lr_schedule warmup_steps seed ds_config
    output_dir resume eval_every save_every keep_last time_limit trackers
""".split()
"""Options of a training run that ``--help`` shows; ``--help_all`` shows all."""
PLAIN_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)*")
"""One or more names, separated by commas."""
WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
"""{Python type of an option: the type in words}, for messages."""
LISTS = {int: "a list of whole numbers", float: "a list of finite numbers"}
"""{type of the items of a list: the list in words}, for messages."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A program in launcher/ that takes the options of a training run, and possibly some of its
    own."""

    name: str
    usage: str
    description: str
    own: type[Any] | None = None
    """Dataclass of the program's own options; None if there are none."""
    trains: bool = True
    """True: data, output folder and trackers must be usable. False: only the model is checked."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """{option: default}, for defaults that differ from those of a training run."""
    common: tuple[str, ...] = tuple(COMMON)
    """Options of a training run that the program's ``--help`` shows; its own options are always
    shown."""
    check: Callable[[Mapping[str, Any]], list[str]] = lambda flat: []
    """Function ({option: value}) -> messages about values that this program cannot work with."""


TRAIN = Program(
    name="launcher/train.py",
    usage=USAGE,
    description="Fine-tune a sharded 4-bit language model with a sparse low-rank adapter.",
)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a program."""

    hint: Any
    """Type hint of the value, e.g. ``int | None``."""
    default: object
    section: str
    """Title of the section of help pages that has the option."""
    method: str | None
    """Method that the option belongs to; None if it does not depend on the method."""


def known_options(program: Program = TRAIN) -> dict[str, Option]:
    """Return all options that a program takes, those of all methods included.

    Methods that are added to ``METHODS`` later are found by later calls.

    Args:
        program: The program; by default launcher/train.py.

    Returns:
        {name: Option}; the program's own options come first.
    """
    return {
        f.name: Option(
            hint=get_type_hints(owner)[f.name],
            default=program.defaults.get(f.name, f.default),
            section=(owner.__doc__ or "").strip(),
            method=method,
        )
        for method, owner in _owners(program)
        for f in fields(owner)
    }


def _owners(program: Program) -> Iterator[tuple[str | None, type[Any]]]:
    """Yield (method or None, dataclass of options) for every dataclass whose options ``program``
    takes.

    The program's own options come first, those of methods last.
    """
    for section in ([program.own] if program.own else []) + list(SECTIONS.values()):
        yield None, section
    for name, factory in methods.METHODS.items():
        yield name, factory.options


def build_parser(program: Program = TRAIN) -> ArgumentParser:
    """Return the jsonargparse parser that knows the type and the help text of every option of
    ``program``."""
    return _parser(program, tuple(methods.METHODS.items()))


# Cached because building it takes a fifth of the time that a short run in a test needs to start.
# The methods are an argument, so that a method registered later gets a new parser.
@cache
def _parser(
    program: Program, known: tuple[tuple[str, methods.MethodFactory], ...]
) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program.name, exit_on_error=False, add_help=False)
    for _, owner in _owners(program):
        parser.add_class_arguments(owner, None, as_group=False)
    parser.set_defaults(dict(program.defaults))
    return parser


def help_texts(program: Program = TRAIN) -> dict[str, str]:
    """Return {option: help text on one line} of all options of ``program``."""
    actions = build_parser(program)._actions
    return {action.dest: " ".join((action.help or "").split()) for action in actions}


def may_be_null(hint: Any) -> bool:
    """Return True if an option of the type ``hint`` may be null."""
    return type(None) in get_args(hint)


def is_switch(hint: Any) -> bool:
    """Return True if an option of the type ``hint`` may be given as a flag without a value, which
    means true."""
    return bool in (hint, *get_args(hint))


def takes_list(hint: Any) -> bool:
    """Return True if an option of the type ``hint`` takes a list of names or numbers."""
    return any(get_origin(t) is tuple for t in (hint, *get_args(hint)))


def items_in(text: str, hint: Any) -> Any:
    """Split the text that was given on the command line for an option that takes a list.

    ``a,b`` gives ["a", "b"] and ``a`` gives ["a"]. The text is returned unchanged if it is
    ``all-linear``, if it starts with ``[`` (the parser reads it as YAML), or if the option also
    takes a regular expression and the text is not plain names.

    Args:
        text: Value as written on the command line.
        hint: Type of the option.

    Returns:
        A list of strings, a list of floats if the option takes floats, or ``text``.
    """
    if text.startswith("[") or text == "all-linear":
        return text
    if get_origin(hint) is not tuple and PLAIN_NAMES.fullmatch(text) is None:
        return text
    items = [item.strip() for item in text.split(",") if item.strip()]
    return [_number(item) for item in items] if float in get_args(hint) else items


def _number(text: str) -> float | str:
    """Return ``text`` as a float if Python can read it as one, otherwise unchanged.

    The YAML parser is not used for this, because YAML 1.1 would take 3e-4 for text.
    """
    try:
        return float(text)
    except ValueError:
        return text


def describe(hint: Any) -> str:
    """Return a type hint in words for messages, such as "a whole number or null"."""
    arguments = get_args(hint)
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(describe(t) for t in arguments)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(hint) is tuple:
        return LISTS.get(arguments[0], "a list of names")
    return WORDS.get(hint, str(hint))


def choices(hint: Any) -> tuple[str, ...]:
    """Return the words that the type ``hint`` allows if it is a Literal or ``Literal | None``.

    The result does not include None. For other types it is empty.
    """
    literals = [t for t in (hint, *get_args(hint)) if get_origin(t) is Literal]
    return tuple(str(word) for literal in literals for word in get_args(literal))
