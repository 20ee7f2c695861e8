"""Help pages: the common options (--help), one method (--help METHOD), all options (--help_all)."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from itertools import groupby

from sparse_lora_dist import methods
from sparse_lora_dist.config.arguments import ACTIONS, Flags
from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.schema import Option, Program, choices, help_texts, known_options
from sparse_lora_dist.config.spelling import did_you_mean

COLUMN = 24  # where help texts begin


def help_page(flags: Flags, program: Program) -> str | None:
    """Return the help page that the command line asks for, or None if it asks for none.

    Args:
        flags: Flags of the command line with the words that follow them.
        program: Program whose help is asked for.

    Raises:
        ConfigError: ``--help`` is followed by a word that is not a method.
    """
    given = dict(flags)
    if "help_all" in given:
        return full_page(program)
    if "help" not in given:
        return None
    if not given["help"]:
        return common_page(program)
    raise_if(_not_a_method(given["help"]))
    return method_page(program, given["help"][0])


def _not_a_method(words: list[str]) -> list[str]:
    name = " ".join(words)
    if name in methods.METHODS:
        return []
    known, hint = ", ".join(methods.METHODS), did_you_mean(name, methods.METHODS)
    return [f"--help takes no value or one method ({known}), got {name!r}{hint}"]


def common_page(program: Program) -> str:
    """Return the page of ``--help``: the common options of ``program`` by section, and the names of
    all methods."""
    options = {name: o for name, o in known_options(program).items() if _is_common(program, name)}
    names = _wrapped("  ", ", ".join(methods.METHODS) + ".")
    head = "Methods (--help METHOD describes one and lists its options):"
    return "\n".join([*_head(program), *_sections(options, program), head, names])


def _is_common(program: Program, name: str) -> bool:
    return name in program.common or name in getattr(program.own, "__dataclass_fields__", {})


def method_page(program: Program, method: str) -> str:
    """Return the page of ``--help METHOD``: what the method does, and its options.

    Args:
        program: Program whose help is asked for.
        method: Name of the method.
    """
    factory = methods.METHODS[method]
    options = {name: o for name, o in known_options(program).items() if o.method == method}
    lines = list(_sections(options, program)) or ["This method has no options of its own."]
    return "\n".join([f"--method {method}: {factory.summary}.", "", *lines])


def full_page(program: Program) -> str:
    """Return the page of ``--help_all``: all options of ``program`` by section, and what each
    method does."""
    known = known_options(program)
    summaries = (_entry(name, m.summary + ".") for name, m in methods.METHODS.items())
    return "\n".join([*_head(program), *_sections(known, program), "Methods:", *summaries])


def _head(program: Program) -> list[str]:
    actions = [_entry(f"--{name}", text) for name, text in ACTIONS.items()]
    usage, text = f"usage: {program.usage}", f"{program.description} Defaults stand in [brackets]."
    return [usage, "", _wrapped("", text), "", "Command line only:", *actions, ""]


def _sections(options: Mapping[str, Option], program: Program) -> Iterable[str]:
    """Yield the lines of a help page: for each section its title, its options and an empty line."""
    texts = help_texts(program)
    for title, names in groupby(options, key=lambda name: _title(options[name])):
        yield f"{title}:"
        for name in names:
            yield _entry(f"--{name}", _with_default(texts[name], options[name]))
        yield ""


def _title(option: Option) -> str:
    return option.section if option.method is None else f"Options of --method {option.method}"


def _with_default(text: str, option: Option) -> str:
    """Return a help text with the default at its end. The allowed words are listed too if the text
    does not name all of them."""
    words = choices(option.hint)
    if not all(word in text for word in words):
        text += f" One of {', '.join(words)}."
    return text if option.default in (None, ()) else f"{text} [{shown(option.default)}]"


def shown(value: object) -> str:
    """Return a default as it is written on the command line, e.g. "a,b", "true" or "null".

    Args:
        value: Default of an option: a number, text, a boolean, None, or a list or tuple.
    """
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "[]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _entry(name: str, text: str) -> str:
    """Return the lines of a help page for one option: its name, and its text in the second column.

    A name that is too long for the first column gets a line of its own.
    """
    start, beside = f"  {name} ", _wrapped(" " * COLUMN, text)
    return start.rstrip() + f"\n{beside}" if len(start) > COLUMN else start + beside[len(start) :]


def _wrapped(indent: str, text: str) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
