"""Write docs/methods/: a page per method, and an index with two tables.

    python docs/generate_methods.py

A page is made of the module docstring of the method's file, the options dataclass and the
`MethodFactory`. Edit those, not the pages; tests/project/test_method_pages.py compares them.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import docstring_parser

from sparse_lora_dist.config.schema import describe
from sparse_lora_dist.methods import METHODS, MethodFactory

FOLDER = Path(__file__).parent / "methods"
GENERATED = "<!-- Written by docs/generate_methods.py. -->"
FACT = re.compile(r"^- \*\*([^*]+):\*\* (.+?)\.(?=\n- |\n\n|\n?\Z)", re.DOTALL | re.MULTILINE)
"""A labelled list item of a module docstring: "- **Paper:** Hu et al. 2021, arXiv:2106.09685."."""
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")

INDEX = """{generated}
# Methods

`--method NAME` selects what trains beside the frozen base. Each name links to a page with the
equation, the options and a command to try.

| method | what it does | choose it when |
|---|---|---|
{choice}

A *component* is row i of A with column i of B. Methods that prune or open components, or entries of
them, work inside a fixed capacity of `--rank` components a linear, so tensors keep their shapes.
What they decide comes from sums over all ranks that are exact, so it does not depend on the number
of ranks. Schedules are fractions of the run.

## Memory and export

R is `--rank`, I and O are the inputs and outputs of a linear. A *live* entry is one that the
optimizer steps. The optimizer state is AdamW's two fp32 moments, 8 bytes an entry; with
`--moment_bits 8` it is 2 bytes, and a scale per 256 entries. Besides, every trained entry takes one
bit, and every live entry 2 bytes while live entries have different birth steps. Methods that start
dense have their peak at the start. Measured bytes are in
[state_bytes.md](../results/state_bytes.md), step times in
[step_time.md](../results/step_time.md), and losses of all methods in
[family.md](../results/family.md).

| method | optimizer state | statistics | exports as |
|---|---|---|---|
{memory}
"""


def text_of(factory: MethodFactory) -> str:
    """Return the docstring of the module that builds the method."""
    return inspect.getdoc(inspect.getmodule(factory.build)) or ""


def facts(factory: MethodFactory) -> dict[str, str]:
    """Return the labelled list items of the module docstring: label -> text on one line."""
    return {label: " ".join(text.split()) for label, text in FACT.findall(text_of(factory))}


def example(name: str) -> list[str]:
    """Return the words of a command that tries the method on the embedded model."""
    program = "deepspeed launcher/train.py --ds_config ds_configs/zero3.json --method"
    run = f"--rank 8 --max_steps 6 --output_dir runs/{name}"
    return f"{program} {name} {METHODS[name].example} {run}".split()


def command(words: list[str]) -> str:
    """Return a command as text, broken into lines of at most 100 characters."""
    flags = re.split(r" (?=--)", " ".join(words))
    lines = [flags[0]]
    for flag in flags[1:]:
        if len(lines[-1]) + len(flag) > 96:
            lines.append(f"    {flag}")
        else:
            lines[-1] += f" {flag}"
    return " \\\n".join(lines)


def row(*cells: str) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def linked(text: str) -> str:
    """Return the text with links to the arXiv papers that it names."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def value(default: object) -> str:
    """Return a default as the command line takes it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return "empty" if default == () else str(default)


def options(factory: MethodFactory) -> str:
    """Return the table of the method's options, or a sentence if there are none."""
    if not fields(factory.options):
        return "The method has no options of its own; `--rank` and `--alpha` apply."
    parsed = docstring_parser.parse_from_object(factory.options)
    help_of = {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
    hints = get_type_hints(factory.options)
    rows = [
        row(f"`--{f.name}`", describe(hints[f.name]), value(f.default), help_of[f.name])
        for f in fields(factory.options)
    ]
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *rows])


def page(name: str) -> str:
    """Return the page of a method."""
    factory = METHODS[name]
    return f"""{GENERATED}
# {name}

{linked(text_of(factory))}

## Options

{options(factory)}

## Example

```
{command(example(name))}
```
"""


def index() -> str:
    """Return the page that lists all methods."""
    choice, memory = [], []
    for name, factory in METHODS.items():
        known, link = facts(factory), f"[{name}]({name}.md)"
        paper = linked(known["Paper"])
        choice.append(row(f"{link}: {paper}", factory.summary, known["Choose it when"]))
        memory.append(row(link, known["Optimizer state"], known["Statistics"], known["Exports as"]))
    return INDEX.format(generated=GENERATED, choice="\n".join(choice), memory="\n".join(memory))


def pages() -> dict[str, str]:
    """Return all pages: file name -> text."""
    return {"index.md": index()} | {f"{name}.md": page(name) for name in METHODS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text)
