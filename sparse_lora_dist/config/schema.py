"""Every option there is: its type in words, its default, its method, and the help page."""

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from sparse_lora_dist import methods
from sparse_lora_dist.config.config import SECTIONS

USAGE = "deepspeed launcher/train.py --ds_config ds_configs/zero3.json [--option value ...]"
PLAIN_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)*")
WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """What reads options, and says so on its help page."""

    name: str
    usage: str
    description: str
    own: type[Any] | None = None
    """Dataclass of options beside those of a run."""
    trains: bool = True
    """Does it need what a run reads and writes besides the model?"""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Of options of a run, where they are not a run's."""
    check: Callable[[Mapping[str, Any]], list[str]] = lambda flat: []
    """{option: value} -> a line for each that the program cannot do with."""


TRAIN = Program(
    name="launcher/train.py",
    usage=USAGE,
    description="Fine-tune a sharded 4-bit language model with a sparse low-rank adapter.",
)


@dataclass(frozen=True, kw_only=True)
class Option:
    """The type of its value, its default, and the method it belongs to, if to one."""

    hint: Any
    default: object
    method: str | None


def sections_of(program: Program) -> dict[str, type[Any]]:
    """Those of a run, and the program's own."""
    return SECTIONS | ({} if program.own is None else {"own": program.own})


def known_options(program: Program = TRAIN) -> dict[str, Option]:
    """{name: Option} of every section and of every method there is at this moment."""
    sections = sections_of(program).values()
    owners: list[tuple[str | None, type[Any]]] = [(None, section) for section in sections]
    owners += [(name, factory.options) for name, factory in methods.METHODS.items()]
    return {
        f.name: Option(
            hint=get_type_hints(owner)[f.name],
            default=program.defaults.get(f.name, f.default),
            method=method,
        )
        for method, owner in owners
        for f in fields(owner)
    }


def build_parser(program: Program = TRAIN) -> ArgumentParser:
    """A parser that knows the type of every option, and prints the help page."""
    return _parser(program, tuple(methods.METHODS.items()))


@cache  # it is a fifth of what a test's short run costs to begin
def _parser(
    program: Program, known: tuple[tuple[str, methods.MethodFactory], ...]
) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    summaries = "; ".join(f"{name} ({m.summary})" for name, m in known)
    parser = ArgumentParser(
        prog=program.name,
        usage=program.usage,
        description=program.description,
        epilog=f"Methods: {summaries}.",
        exit_on_error=False,
        add_help=False,
    )
    command = parser.add_argument_group("Command line only")
    command.add_argument("--config", metavar="FILE", help="YAML file of options; flags win")
    command.add_argument("--print_config", action="store_true", help="print all values and leave")
    command.add_argument("--help", action="store_true", help="print this page and leave")
    for section in sections_of(program).values():
        parser.add_class_arguments(section, None)
    for name, factory in known:
        group = parser.add_argument_group(f"Options of --method {name}")
        group.add_class_arguments(factory.options, None, as_group=False)
    parser.set_defaults(dict(program.defaults))
    return parser


def may_be_null(hint: Any) -> bool:
    """Is null a value of this type?"""
    return type(None) in get_args(hint)


def is_switch(hint: Any) -> bool:
    """Does the flag alone, without a word after it, mean true?"""
    return bool in (hint, *get_args(hint))


def takes_list(hint: Any) -> bool:
    """Is a value of this type a list of names or numbers?"""
    return any(get_origin(t) is tuple for t in (hint, *get_args(hint)))


def items_in(text: str, hint: Any) -> Any:
    """The names or numbers in ``text`` for an option that takes a list of them.

    ``a,b`` is two names and ``a`` is one. Where the option takes a regex too, all that is not plain
    names is a regex, and ``all-linear`` stays the word that PEFT knows. ``[a, b]`` is left to YAML.
    """
    if text.startswith("[") or text == "all-linear":
        return text
    if get_origin(hint) is not tuple and PLAIN_NAMES.fullmatch(text) is None:
        return text
    items = [item.strip() for item in text.split(",") if item.strip()]
    return [_number(item) for item in items] if float in get_args(hint) else items


def _number(text: str) -> float | str:
    """As Python reads it (YAML 1.1 takes 3e-4 for text); what is none goes on to be refused."""
    try:
        return float(text)
    except ValueError:
        return text


def describe(hint: Any) -> str:
    """The type in words: "a whole number or null"."""
    arguments = get_args(hint)
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(describe(t) for t in arguments)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(hint) is tuple:
        return "a list of finite numbers" if float in arguments else "a list of names"
    return WORDS.get(hint, str(hint))
