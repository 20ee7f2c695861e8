"""A file of edits as KnowEdit has them: read, and every problem in it found at once.

A JSON list, or an object a line. Fields go by the names that KnowEdit's data sets give them; an
answer may be a text, a list of aliases, or a list of such lists, of which the first counts, as in
EasyEdit.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.editing.edits import Edit, Edits, Question
from sparse_lora_dist.errors import UserError

NAMES: dict[str, tuple[str, ...]] = {
    "subject": ("subject", "concept"),
    "prompt": ("prompt", "text"),
    "target_new": ("target_new", "labels"),
    "rephrase_prompt": ("rephrase_prompt", "rephrase"),
}
"""The first is ZsRE's, which messages use; WikiBio and counterfact have others."""
READ = {"portability", "locality", *(name for names in NAMES.values() for name in names)}
NEEDED = ("subject", "prompt", "target_new")
BETWEEN = re.compile(r"[\s,]*")
MOST_TOLD = 20
"""Problems; a file that has more is of another kind."""


def read_edits(path: Path) -> Edits:
    """All of a file.

    Raises:
        UserError: with every problem there is, by line and field.
    """
    reader, edits = _Reader(), []
    for number, (line, record) in enumerate(_records(path), start=1):
        reader.place = f"{path}:{line}: edit {number}"
        if edit := reader.edit(record):
            edits.append(edit)
    if not (edits or reader.problems):
        none = f"{path}: no edit in it; it needs a JSON list of them, or one a line"
        raise UserError(none, shared=True)
    if reader.problems:
        raise UserError(_all_of(path, reader.problems), shared=True)
    return Edits(
        edits=tuple(edits),
        without_answer=reader.without_answer,
        unread=tuple(sorted(reader.unread)),
    )


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element of a JSON list, or of each line of JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            json.loads(text)  # what lies between the elements too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--edits {path} cannot be read: {error}", shared=True) from error
    except json.JSONDecodeError as error:
        raise _not_json(path, error) from error
    at, end = _after(text, 0), len(text)
    if text[at : at + 1] == "[":
        at, end = _after(text, at + 1), text.rindex("]")
    line, counted_to = 1, 0
    while at < end:
        line, counted_to = line + text.count("\n", counted_to, at), at
        try:
            value, after = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _not_json(path, error) from error
        yield line, value
        at = _after(text, after)


def _after(text: str, at: int) -> int:
    between = BETWEEN.match(text, at)
    return between.end() if between else at


def _not_json(path: Path, error: json.JSONDecodeError) -> UserError:
    where = f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
    return UserError(f"{where}; edits are a JSON list of objects, or an object a line", shared=True)


def _all_of(path: Path, problems: Sequence[str]) -> str:
    told = "\n".join(f"  - {problem}" for problem in problems[:MOST_TOLD])
    more = len(problems) - MOST_TOLD
    rest = f"\n  and {more:,} more" if more > 0 else ""
    known = "; ".join(" or ".join(names) for names in NAMES.values())
    return (
        f"{path} has {counted(len(problems), 'problem')}:\n{told}{rest}\n"
        f"Edits are in KnowEdit's format, with the fields: {known}; locality; portability."
    )


class _Reader:
    """One record after another, with what is wrong in all of them."""

    def __init__(self) -> None:
        self.place = ""
        self.problems: list[str] = []
        self.without_answer = 0
        self.unread: set[str] = set()

    def edit(self, record: Any) -> Edit | None:
        """None where there is a problem."""
        before = len(self.problems)
        if not isinstance(record, dict):
            self._bad(f"must be an object, got {type(record).__name__}")
            return None
        self.unread |= record.keys() - READ
        given = {name: self._text_of(record, name) for name in NAMES}
        probes = {
            name: self._probes(record.get(name), name) for name in ("portability", "locality")
        }
        if len(self.problems) > before:
            return None
        target, rephrased = given["target_new"], given["rephrase_prompt"]
        return Edit(
            subject=given["subject"],
            fact=Question(prompt=given["prompt"], answer=target),
            rephrased=Question(prompt=rephrased, answer=target) if rephrased else None,
            **probes,
        )

    def _text_of(self, record: Mapping[str, Any], name: str) -> str:
        """ "" where it need not be there and is not."""
        value = next((record[n] for n in NAMES[name] if n in record), None)
        if _first(value) is None and name in NEEDED:
            self._bad(f"{name} is missing or null; it must be text")
        return self._text(value, name, may_be_blank=name not in NEEDED) or ""

    def _probes(self, value: Any, name: str) -> dict[str, tuple[Question, ...]]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._bad(f"{name} must be {{kind: [probes]}}, got {type(value).__name__}")
            return {}
        found = {}
        for kind, probes in value.items():
            if not isinstance(probes, list | None):
                self._bad(f"{name}.{kind} must be a list, got {type(probes).__name__}")
                continue
            each = [self._probe(p, f"{name}.{kind}[{i}]") for i, p in enumerate(probes or [])]
            if questions := tuple(question for question in each if question):
                found[kind] = questions
        return found

    def _probe(self, value: Any, name: str) -> Question | None:
        if not isinstance(value, dict):
            self._bad(f"{name} must be an object, got {type(value).__name__}")
            return None
        for key in ("prompt", "ground_truth"):
            if key not in value:
                self._bad(f"{name}.{key} is missing")
            elif key == "prompt" and _first(value[key]) is None:
                self._bad(f"{name}.prompt is null; it must be text")
        prompt = self._text(value.get("prompt"), f"{name}.prompt")
        answer = self._text(value.get("ground_truth"), f"{name}.ground_truth", may_be_blank=True)
        if prompt and not answer:
            self.without_answer += 1
        return Question(prompt=prompt, answer=answer) if prompt and answer else None

    def _text(self, value: Any, name: str, *, may_be_blank: bool = False) -> str | None:
        text = _first(value)
        if text is None:
            return None
        if not isinstance(text, str):
            self._bad(f"{name} must be text, got {type(text).__name__}: {str(text)[:40]}")
        elif not text.strip() and not may_be_blank:
            self._bad(f"{name} is blank")
        return text if isinstance(text, str) and text.strip() else None

    def _bad(self, what: str) -> None:
        self.problems.append(f"{self.place}: {what}")


def _first(value: Any) -> Any:
    """Of aliases, of which the first is the answer; None where there is none."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value
