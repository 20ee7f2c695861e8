"""The rules of the house that a reader relies on: who imports whom, names of programs, sizes."""

import ast
import importlib.util
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from textwrap import dedent

import pytest

import sparse_lora_dist

PACKAGE = Path(sparse_lora_dist.__file__).parent
REPOSITORY = PACKAGE.parent
UNCOUNTED = ("__init__.py", "__main__.py")
"""Files that every folder may have."""
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_CODE, LONGEST_FUNCTION = 300, 60
"""Lines of code of a file and of a function, docstrings and comments not counted."""
NOT_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_main(node: ast.AST) -> bool:
    """What only ``python -m`` runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(file: Path) -> Iterator[str]:
    """Every module the file imports, wherever in it; ``from a import b`` may be a module a.b."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if not is_main(node)]
    for node in ast.walk(tree):
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


ORDER = """
errors.py version.py system methods/protocol methods/shared methods data distributed zero3 optim
config base_model base_model/cache run_folder adapter runtime sparsity tasks model
plan/playback plan checkpoint export report show training evaluation editing
train.py examples.py programs.py eval.py edit.py grid.py api.py __main__ __init__.py
""".split()
"""Rooms of the package, in the order of the data: folders, and files of the root."""


def room(module: str) -> str:
    """The folder of ORDER that a module of the package lies in; of a file in the root, itself."""
    if module.endswith(".__main__"):  # python -m calls it, nobody imports it
        return "__main__"
    path = module.replace(".", "/").removeprefix("sparse_lora_dist").removeprefix("/")
    places = [path, *(str(parent) for parent in Path(path).parents)]
    rooms = [r for place in places for r in (place, f"{place}.py") if r in ORDER]
    return rooms[0] if rooms else "__init__.py"


def test_every_file_is_in_a_folder_of_the_order() -> None:
    folders = {str(f.parent.relative_to(PACKAGE)) for f in FILES}
    root = {f.name for f in FILES if f.parent == PACKAGE}
    assert (folders - {"."}) | root == set(ORDER) - {"__main__"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_folder_imports_a_later_one(file: Path) -> None:
    own = room(module_name(file))
    for module in imported(file):
        if is_in(module, "sparse_lora_dist") and module != "sparse_lora_dist":
            assert ORDER.index(room(module)) <= ORDER.index(own), f"{own} imports {module}"


def test_folders_stay_small() -> None:
    count = Counter(str(f.parent.relative_to(PACKAGE)) for f in FILES if f.name not in UNCOUNTED)
    assert count.pop(".") <= 9  # five of them are what python -m starts
    assert count.pop("methods") >= 17
    assert max(count.values()) <= 13, count.most_common(3)


def test_only_zero3_imports_deepspeed() -> None:
    assert {Path(name).parent.name for name in importers("deepspeed")} == {"zero3"}


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
    assert importers("sparse_lora_dist.train") == {"__init__.py", "programs.py"}


@pytest.mark.usefixtures("processes")
@pytest.mark.usefixtures("processes")
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
    """Name and lines of code of every function and method."""
    source = file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            yield node.name, lines_of_code(dedent("\n".join(lines)))


def lines_of_code(source: str) -> int:
    """Lines that hold a token of code: no blank lines, no comments, no docstrings."""
    tokens = list(tokenize.generate_tokens(StringIO(source).readline))
    lines: set[int] = set()
    begins = True
    for token in tokens:
        if token.type in NOT_CODE:
            begins = begins or token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            continue
        if not (begins and token.type == tokenize.STRING):
            lines |= set(range(token.start[0], token.end[0] + 1))
        begins = False
    return len(lines)


def test_docstrings_comments_and_blank_lines_are_no_code() -> None:
    source = '"""Two\nlines."""\n\nx = 1  # one\n"""Of x."""\n# none\ny = (\n    "text"\n)\n'
    assert lines_of_code(source) == 4


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_stay_readable(file: Path) -> None:
    too_long = {name: size for name, size in functions(file) if size > LONGEST_FUNCTION}
    assert too_long == {}
    assert lines_of_code(file.read_text()) <= MOST_CODE


@pytest.mark.usefixtures("processes")
def test_the_pages_of_results_are_those_of_the_benchmarks() -> None:
    """Mended by ``python benchmarks/docs_tables.py``."""
    command = [sys.executable, "benchmarks/docs_tables.py", "--check"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
