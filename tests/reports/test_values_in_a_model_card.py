"""What somebody called a model, a data file or a folder does not get out of its place in a card.

A card has YAML that the hub reads, a table, and lines of Python that readers copy and run.
"""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_lora_dist.export.card import cell, write_card
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.model.prompting import Prompting
from tests.training.test_runs_of_before import MADE

NAMES = [
    "org/model",
    "a\"b'c",
    'x")\nimport os; os.system("echo hacked") #',
    "y\n```\n\n# Title\n\n<script>alert(1)</script>\n",
    "z\nlicense: mit\nbase_model: other",
    "[here](http://evil) | more | ![x](y)",
    "- a: {b}\t\\ \\| `code`",
    "{0} {folder} %s $HOME",
    "\u202egnp.exe\u2028next\x1b[31m",
    "---\n...\n!!python/object/apply:os.system [ls]",
]


def named(name: str) -> Trained:
    trained = Trained.at(MADE / "adalora_end" / "step_00000012")
    config = replace(
        trained.config,
        data=replace(trained.config.data, data=name),
        model=replace(trained.config.model, revision=name),
    )
    prompting = Prompting(
        chat_template=name, is_own=False, ends={name: 1}, generation={"eos_token_id": 1}
    )
    manifest = trained.manifest | {"base": name, "prompting": prompting.as_json()}
    return replace(trained, manifest=manifest, config=config)


@pytest.mark.parametrize("kind", ["peft", "merged", "sparse_delta"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_a_name(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_card(named(name), folder, Path("/served") / name, kind, {"ends": f"with {name}"})
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, rest = text.split("---\n", 2)
    assert yaml.safe_load(front) == ({"base_model": name} if name == "org/model" else {}) | {
        "library_name": "peft" if kind == "peft" else "transformers",
        "tags": ["sparse-lora-dist", "lora"],
    }
    table, _, rest = rest.partition("\n```python\n")
    code, _, end = rest.partition("\n```\n")
    rows = table.strip().splitlines()
    assert rows[0].startswith("# ") and rows[2:4] == ["| | |", "|---|---|"]
    assert all(re.fullmatch(r"\| [\w -]+ \| (\\.|[^|\\`<>\[\]])* \|", row) for row in rows[4:])
    assert end.count("\n") == 2, "nothing follows but the line that says who wrote it"
    calls: list[Any] = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    texts = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)}
    assert str(Path("/served") / name) in texts
    assert {c.func.attr for c in calls if isinstance(c.func, ast.Attribute)} <= {
        *("from_pretrained", "read_text", "undo")
    }
    assert {c.func.id for c in calls if isinstance(c.func, ast.Name)} <= {
        *("Path", "apply_sparse_delta")
    }


def test_ordinary_text_is_not_changed() -> None:
    text = "1,234 of 5,678 linears (0.5%), rank 1 to 4: _a_ /path/to_some/file-1.2 --format"
    assert cell(text) == text
