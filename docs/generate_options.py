"""Generate docs/options.md from the options' dataclasses.

python docs/generate_options.py > docs/options.md
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from typing import get_type_hints

# Works from a plain clone too: a script's own folder is on sys.path, the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.config.arguments import ACTIONS
from sparse_lora_dist.config.help_pages import shown
from sparse_lora_dist.config.schema import TRAIN, Option, Program, describe, help_texts
from sparse_lora_dist.config.schema import known_options as options_of
from sparse_lora_dist.editing.edit_options import PROGRAM as EDIT
from sparse_lora_dist.evaluation.eval_options import PROGRAM as EVAL
from sparse_lora_dist.export.export_options import ExportConfig
from sparse_lora_dist.export.export_options import build_parser as export_parser
from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.plan.plan_options import PROGRAM as PLAN

HEAD = f"""# Options

Made by `python docs/generate_options.py > docs/options.md`; do not edit.

All options of `launcher/train.py`, then those that other programs add. An option is a flag
(`--rank 8`) and a key of the YAML file of `--config` (`rank: 8`). Options that `--help` shows are
**bold**; `--help METHOD` shows those of a method, and `--help_all` shows all.

| command line only | |
|---|---|
{chr(10).join(f"| `--{name}` | {text} |" for name, text in ACTIONS.items())}
"""
TABLE = "| option | type | default | |\n|---|---|---|---|"


def page() -> str:
    """Return the text of docs/options.md."""
    parts = [HEAD, *_training(), *(_own(program) for program in (PLAN, EVAL, EDIT)), _export()]
    return "\n".join(parts)


def _training() -> Iterator[str]:
    """Yield a section for each section of a run, and one for each method."""
    options, texts = options_of(), help_texts()
    run = {name: option for name, option in options.items() if option.method is None}
    for title, names in groupby(run, key=lambda name: run[name].section):
        yield _section(f"## {title}", {name: run[name] for name in names}, texts)
    yield "## Methods\n"
    for method, factory in METHODS.items():
        own = {name: option for name, option in options.items() if option.method == method}
        head = f"### {method}\n\n`--method {method}`: {factory.summary}."
        yield _section(head, own, texts) if own else f"{head} No options of its own.\n"


def _own(program: Program) -> str:
    """Return the section of the options that a program adds, and of other defaults it has."""
    added = {n: o for n, o in options_of(program).items() if n not in options_of()}
    head = f"## {program.name}\n\n{program.description}"
    if program.defaults:
        changed = (f"`{name}` {shown(value)}" for name, value in program.defaults.items())
        head += f"\n\nOther defaults: {', '.join(changed)}."
    return _section(head, added, help_texts(program))


def _export() -> str:
    """Return the section of launcher/export.py, which has a parser of its own."""
    hints = get_type_hints(ExportConfig)
    defaults = {f.name: f.default for f in fields(ExportConfig)}
    texts = {a.dest: " ".join((a.help or "").split()) for a in export_parser()._actions}
    options = {
        name: Option(hint=hints[name], default=value, section="", method=None)
        for name, value in defaults.items()
    }
    return _section("## launcher/export.py\n\nAlso takes the run folder.", options, texts)


def _section(head: str, options: Mapping[str, Option], texts: Mapping[str, str]) -> str:
    rows = (_row(name, option, texts[name]) for name, option in options.items())
    return "\n".join([head, "", TABLE, *rows, ""])


def _row(name: str, option: Option, text: str) -> str:
    flag = f"`{name}`" if name not in TRAIN.common else f"**`{name}`**"
    default = "required" if option.default is MISSING else f"`{shown(option.default)}`"
    cells = (flag, describe(option.hint), default, text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
