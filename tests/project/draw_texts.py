"""Draw docstrings and error messages at random, for a reader who has not seen the project.

    python -m tests.project.draw_texts SEED [COUNT]

Prints COUNT (30) docstrings of modules, classes and functions with their signatures, then COUNT
messages of errors and refusals, each with file and line. Fields in braces stand for values.
"""

import ast
import random
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "sparse_lora_dist"
ERRORS = {"UserError", "ConfigError", "ValueError", "ExampleError", "PeerError", "Stopped"}


def docstrings(file: Path, tree: ast.Module) -> Iterator[str]:
    """Place, signature and text of each docstring of a file."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            name = "" if isinstance(node, ast.Module) else node.name
            if isinstance(node, ast.FunctionDef):
                name += f"({ast.unparse(node.args)})"
            if text:
                line = getattr(node, "lineno", 1)
                yield f"{file.relative_to(PACKAGE)}:{line} {name}\n{text}"


def messages(file: Path, tree: ast.Module) -> Iterator[str]:
    """Place and text of each message that is raised or added to a list of problems."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if (name in ERRORS or (name == "append" and owner == "problems")) and (
            text := template(node.args[0])
        ):
            yield f"{file.relative_to(PACKAGE)}:{node.lineno}\n{text}"


def template(node: ast.expr) -> str:
    """The text of a string or f-string; nothing for other expressions."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"{{{ast.unparse(part.value)}}}"
            if isinstance(part, ast.FormattedValue)
            else str(getattr(part, "value", ""))
            for part in node.values
        )
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def main(seed: int, count: int = 30) -> None:
    trees = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    numbers = random.Random(seed)
    for kind, texts_of in (("docstring", docstrings), ("message", messages)):
        texts = [text for file, tree in trees.items() for text in texts_of(file, tree)]
        print(f"# {count} of {len(texts)} {kind}s\n")
        for number, text in enumerate(numbers.sample(texts, count), start=1):
            print(f"## {kind} {number}: {text}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
