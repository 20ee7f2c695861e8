"""Read and write YAML files of options: numbers as YAML 1.2 has them, and nothing that can explode.

PyYAML reads YAML 1.1, in which 0100 is 64, 1:30 is 90 and 2024-12-31 is a date. Here they are 100
and two texts. An alias (*name) may stand for one value only: with aliases of lists, a file of a few
lines can describe a list of a billion items.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparse_lora_dist.errors import UserError, in_words
from sparse_lora_dist.system.small_files import text_of

INT = "tag:yaml.org,2002:int"
FLOAT = "tag:yaml.org,2002:float"
TIMESTAMP = "tag:yaml.org,2002:timestamp"
DECIMAL = re.compile(r"[-+]?(?:[0-9][0-9_]{0,400}|0x[0-9a-fA-F]{1,100})$")
"""A whole number. Longer ones are text, since Python refuses to read thousands of digits."""
FRACTION = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
MOST_NAMES = 1000
"""Largest number of ``name: value`` lines of a file."""


class _WithoutAliases:
    """Part of a loader that refuses aliases of lists and maps."""

    anchors: dict[str, yaml.Node]

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        loader: Any = self
        if loader.check_event(yaml.AliasEvent):
            event = loader.peek_event()
            if not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"the alias *{event.anchor} stands for no single value. Write it out",
                    event.start_mark,
                )
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[misc]
        return node


class PlainLoader(_WithoutAliases, yaml.SafeLoader):
    """Loader that reads text, numbers, true, false, null and lists of them."""


class TextLoader(_WithoutAliases, yaml.BaseLoader):
    """Loader that reads every value as text, and YAML's other words for null as "null"."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        is_null = node.style is None and node.value in ("", "~")
        return "null" if is_null else str(super().construct_scalar(node))


class PlainDumper(yaml.SafeDumper):
    """Dumper that puts quotes around each text that ``PlainLoader`` would not read as text."""


def _int(loader: PlainLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16) if "x" in text else int(text)


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (INT, FLOAT, TIMESTAMP)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver(INT, DECIMAL, list("-+0123456789"))
PlainLoader.add_implicit_resolver(FLOAT, FRACTION, list("-+0123456789."))
PlainLoader.add_constructor(INT, _int)
PlainDumper.yaml_implicit_resolvers = PlainLoader.yaml_implicit_resolvers


def _refuse(loader: PlainLoader, node: yaml.Node) -> None:
    tag = node.tag.rpartition(":")[2]
    said = f"the tag !!{tag} is not allowed. Write a list as [a, b], other values without a tag"
    raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)


for _tag in ("set", "omap", "pairs", "binary"):  # a set has another order in each process
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refuse)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One ``name: value`` line of a YAML file."""

    name: str
    value: Any
    line: int
    """Number of the line, from 1."""


def yaml_value(text: str) -> Any:
    """Return the value of one word of the command line, read as YAML.

    A map is returned as ``text``: no option takes a map, and a path may have a colon.

    Raises:
        yaml.YAMLError: as ``parse_yaml``.
    """
    value = parse_yaml(text)
    return text if isinstance(value, dict) else value


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or has a value that cannot be read. No other exception is
            raised.
    """
    try:
        return yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # !!int abc, !!timestamp x, 300 nested lists ...
        raise yaml.YAMLError(in_words(error)) from error


def yaml_of(options: Mapping[str, Any]) -> str:
    """Return options as a YAML text that ``parse_yaml`` reads as the same options."""
    return yaml.dump(dict(options), Dumper=PlainDumper, sort_keys=False)


def read_entries(
    path: str, *, place: str, loader: type[PlainLoader] | type[TextLoader] = PlainLoader
) -> list[Entry]:
    """Read a YAML file of ``name: value`` lines.

    Args:
        path: path of the file.
        place: what messages call the file.
        loader: how values are read: ``PlainLoader``, or ``TextLoader`` for all as text.

    Returns:
        The lines in their order. A name that is set twice is there twice.

    Raises:
        UserError: the file cannot be read, is not YAML, or does not have this form.
    """
    try:
        reader: Any = loader(text_of(Path(path)))
        root = reader.get_single_node()
        if root is not None and not isinstance(root, yaml.MappingNode):
            held = "a list" if isinstance(root, yaml.SequenceNode) else "one value"
            raise UserError(f"{path} must hold 'name: value' lines, but holds {held}")
        pairs = [] if root is None else root.value
        if len(pairs) > MOST_NAMES:
            raise UserError(f"{path} holds {len(pairs)} names, but at most {MOST_NAMES} are read")
        return [_entry(reader, path, key, value) for key, value in pairs]
    except UserError:
        raise
    except Exception as error:  # OSError, no UTF-8, YAMLError, and what values raise: !!int abc
        text = " ".join(str(error).split())
        said = text if isinstance(error, OSError | yaml.YAMLError) else in_words(error)
        raise UserError(f"{place} cannot be read as YAML: {said}") from error


def _entry(reader: Any, path: str, key: yaml.Node, value: yaml.Node) -> Entry:
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(f"{path} line {line} must begin with a name, but begins with a list or map")
    return Entry(name=key.value, value=reader.construct_object(value, deep=True), line=line)
