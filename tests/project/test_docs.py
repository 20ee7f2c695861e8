"""The documentation: links lead somewhere, examples parse, those of docs/python.md run."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from sparse_lora_dist.config.schema import known_options
from sparse_lora_dist.editing.edit_options import EditConfig
from sparse_lora_dist.evaluation.eval_options import EvalConfig
from sparse_lora_dist.export.export_options import ExportConfig
from sparse_lora_dist.plan.plan_options import PlanConfig
from tests.tiers import in_full

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
GUIDES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
OTHERS = set(
    """
    config print_config help help_all output png logdir quiet
    num_gpus hostfile no_ssh node_rank master_addr master_port standalone nproc_per_node nnodes
    rdzv_backend rdzv_endpoint rdzv_id max_restarts bind no module wheel
    nodes gpus ntasks cpus time signal partition account me array dependency mem chdir
    enable lora chat generation max model_args kills seed constraint
    """.split()
)
"""Flags of other programs that the pages name, up to their first hyphen."""


def blocks(page: Path, language: str) -> Iterator[str]:
    for indent, name, text in FENCED.findall(page.read_text()):
        if name == language:
            yield textwrap.dedent(text) if indent else text


def anchor(heading: str) -> str:
    """As mkdocs and GitHub make it of a heading without markup."""
    words = re.sub(r"[^\w\s-]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in HEADING.findall(FENCED.sub("", page.read_text()))}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link} is not there"
        if page.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{page.name}: {link} is not on the site"
        if fragment:
            assert fragment in anchors(target), f"{page.name}: {link} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_parse(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")
    for text in blocks(page, "json"):
        json.loads(text)
    for text in blocks(page, "yaml"):
        yaml.safe_load(text)


def test_files_that_the_pages_name_exist() -> None:
    files = {f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.py")}
    for page in PAGES:
        for name in re.findall(r"`(\w[\w.-]*/[\w./-]*\.py)`", page.read_text()):
            assert any(file.endswith(f"/{name}") for file in files), f"{page.name}: {name}"


def texts_of(source: str) -> Iterator[str]:
    """The texts of a file, implicit concatenations and the parts of f-strings joined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            yield " ... ".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_quotes_texts_that_the_package_has() -> None:
    files = (ROOT / "sparse_lora_dist").rglob("*.py")
    texts = " | ".join(text for file in files for text in texts_of(file.read_text()))
    rows = re.findall(r"^\| (.+?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 15
    assert [text for text in quoted if text not in texts] == []


def test_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1600
    assert "No GPU has run this code yet" in "\n".join(text.splitlines()[:20])


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_that_the_pages_name_exist(page: Path) -> None:
    own = (EditConfig, EvalConfig, ExportConfig, PlanConfig)
    options = {*known_options(), *(f.name for part in own for f in fields(part)), *OTHERS}
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", page.read_text()))
    assert named <= options, sorted(named - options)


def test_every_page_of_the_menu_exists() -> None:
    def pages(menu: object) -> Iterator[str]:
        if isinstance(menu, str):
            yield menu
        elif isinstance(menu, dict):
            for part in menu.values():
                yield from pages(part)
        elif isinstance(menu, list):
            for part in menu:
                yield from pages(part)

    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert [name for name in pages(menu) if not (DOCS / name).is_file()] == []


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("number", [0, *map(in_full, range(1, len(EXAMPLES)))])
def test_an_example_runs_as_it_stands(number: int, tmp_path: Path) -> None:
    for name in ("assets", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "example.py").write_text(EXAMPLES[number])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ["adapter/adapter_model.safetensors", "entries live", "weights changed"][number]
    assert expected in done.stdout or list(tmp_path.glob(f"runs/*/{expected}"))
    assert "Warning" not in done.stderr
