"""Types, defaults, sections and help texts of all options, and the parser for their values."""

import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from sparse_lora_dist import methods
from sparse_lora_dist.config.config import SECTIONS
from sparse_lora_dist.config.yaml_file import yaml_value

USAGE = "deepspeed launcher/train.py --ds_config zero3 [--option value ...]"
COMMON = """
    model task precision gradient_checkpointing data eval_data prompt_field response_field
    sequence_length method rank alpha dropout target_modules max_steps num_epochs micro_batch_size
    gradient_accumulation_steps learning_rate lr_schedule warmup_steps seed ds_config
    output_dir resume eval_every save_every keep_last time_limit trackers
""".split()
"""Options of a training run that ``--help`` shows; ``--help_all`` shows all."""
PLAIN_NAMES = re.compile(r"[\w.-]+ *(, *[\w.-]+ *)*")
"""One or more names, separated by commas, with or without blanks around these."""
WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
"""{Python type of an option: the type in words}, for messages."""
NULL = ("null", "Null", "NULL")
"""Words for null. YAML's ~ is a path here: the home."""
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
    ignored: Mapping[str, str] = field(default_factory=dict)
    """{option of a training run without effect here: what to do, or ""}. It is refused on
    the command line. A file of options, such as a run's run.yaml, may have it."""
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


def new_parser(**arguments: Any) -> ArgumentParser:
    """Return a jsonargparse parser without arguments, which reads values as ``yaml_file`` does.

    Args:
        arguments: arguments of ``ArgumentParser``.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("sparse_lora_dist", yaml_value, exceptions=(yaml.YAMLError,))
    return ArgumentParser(parser_mode="sparse_lora_dist", exit_on_error=False, **arguments)


# Cached because building it takes a fifth of the time that a short run in a test needs to start.
# The methods are an argument, so that a method registered later gets a new parser.
@cache
def _parser(
    program: Program, known: tuple[tuple[str, methods.MethodFactory], ...]
) -> ArgumentParser:
    parser = new_parser(prog=program.name, add_help=False)
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


def value_of(text: str, hint: Any) -> Any:
    """Return the value that a text stands for, as an option of the type ``hint`` reads it.

    jsonargparse would read it as YAML 1.1, in which 1:30 is 90 and an alias can explode.

    Args:
        text: Word of the command line, or text in a YAML file.
        hint: Type of the option.

    Returns:
        A number, a boolean, None, a list, or ``text``. Whether it has the type is not checked.

    Raises:
        TypeError: The option takes no text, and ``text`` stands for nothing else.
        yaml.YAMLError: The option takes no text, and ``text`` cannot be read.
    """
    kinds = (hint, *get_args(hint))
    words = {str(w): w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind)}
    if takes_list(hint):
        return _list_of(text, takes_text=get_origin(hint) is not tuple)
    if text in words:
        return words[text]
    if text in NULL and may_be_null(hint):
        return None
    if str in kinds:
        return text
    value = yaml_value(text)
    if isinstance(value, str):
        raise TypeError
    return value


def _list_of(text: str, *, takes_text: bool) -> Any:
    """Return the list that a text stands for.

    ``a,b`` gives ["a", "b"], ``a`` gives ["a"], and ``[a, b]`` is read as YAML. The text is
    returned unchanged if it is ``all-linear``, or if the option also takes a regular expression and
    the text is not plain names.

    Args:
        text: Value as written on the command line.
        takes_text: True if the option also takes a regular expression.
    """
    text = text.strip()
    if text.startswith("["):
        try:
            value = yaml_value(text)
        except yaml.YAMLError:
            if not takes_text:  # a regular expression such as [qv]_proj is no YAML
                raise
            return text
        return value
    if text == "all-linear" or (takes_text and PLAIN_NAMES.fullmatch(text) is None):
        return text
    return [item for item in text.split(",") if item.strip()]


def items_of(items: list[Any], hint: Any) -> list[Any]:
    """Return the items of an option's list, without blanks around names, and with texts replaced by
    the numbers that they stand for if the option takes a list of numbers.

    Raises:
        TypeError: A text stands for no number.
    """
    kinds = [get_args(t) for t in (hint, *get_args(hint)) if get_origin(t) is tuple]
    if not kinds or str in kinds[0]:
        return [item.strip() if isinstance(item, str) else item for item in items]
    return [value_of(item, float) if isinstance(item, str) else item for item in items]


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
