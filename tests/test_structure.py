"""The rules of the house that a reader relies on: who imports whom, names of programs, sizes."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_lora_dist

PACKAGE = Path(sparse_lora_dist.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION = 60
LONGEST_FILE = 300


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Every module the file imports, wherever in it; ``from a import b`` may be a module a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: a relative import, not followed here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def importers(module: str) -> set[str]:
    """Names of the package's files that import ``module`` or something in it."""
    return {
        str(f.relative_to(PACKAGE)) for f in FILES if any(is_in(m, module) for m in imported(f))
    }


def test_only_zero3_imports_deepspeed() -> None:
    assert importers("deepspeed") == {"zero3/engine.py"}


def test_only_comm_imports_torch_distributed() -> None:
    assert importers("torch.distributed") == {"distributed/comm.py"}


def test_torch_distributed_is_not_reached_by_attribute_either() -> None:
    reaching = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    }
    assert reaching == set()


def test_nobody_in_the_package_imports_the_main_program() -> None:
    assert importers("sparse_lora_dist.train") == {"__init__.py"}  # for who reads types
    launcher = set(imported(REPOSITORY / "launcher" / "train.py"))
    assert "sparse_lora_dist.train" in launcher


def test_the_package_itself_is_open_at_once() -> None:
    code = "import sys, sparse_lora_dist as s; sys.exit('torch' in sys.modules or hasattr(s, 'x'))"
    subprocess.run([sys.executable, "-c", code], check=True)


def pure_files() -> list[Path]:
    return sorted((PACKAGE / "methods").rglob("*.py"))


@pytest.mark.parametrize("file", pure_files(), ids=module_name)
def test_methods_import_torch_and_each_other_only(file: Path) -> None:
    allowed = ("torch", "sparse_lora_dist.methods", "sparse_lora_dist.methods.shared.schedules")
    foreign = [
        module
        for module in imported(file)
        if module.partition(".")[0] not in sys.stdlib_module_names
        and not any(is_in(module, a) for a in allowed)
        and module != "sparse_lora_dist"
    ]
    assert foreign == []
    assert not any(is_in(m, "torch.distributed") for m in imported(file))


@pytest.mark.parametrize(
    "program", sorted((REPOSITORY / "launcher").glob("*.py")), ids=lambda f: f.name
)
def test_no_program_bears_the_name_of_a_module_it_would_hide(program: Path) -> None:
    # A script's own folder comes first on sys.path, before the standard library.
    assert program.stem not in sys.stdlib_module_names
    assert importlib.util.find_spec(program.stem) is None


def functions(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_stay_readable(file: Path) -> None:
    too_long = {name: size for name, size in functions(file) if size > LONGEST_FUNCTION}
    assert too_long == {}
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


def test_the_tables_in_readme_are_those_of_the_results() -> None:
    """Mended by ``python benchmarks/readme_tables.py``."""
    command = [sys.executable, "benchmarks/readme_tables.py", "--print"]
    made = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert made.stdout.strip() in (REPOSITORY / "README.md").read_text()
