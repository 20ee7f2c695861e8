"""Reads a file of edits in KnowEdit's format, and reports all problems of the file at once.

The file is a JSON list of objects, or one JSON object per line. An object describes one edit:

    subject           what the fact is about
    prompt            text before the answer
    target_new        the new answer
    rephrase_prompt   optional: another wording of the prompt
    portability       optional: {kind: [{"prompt": ..., "ground_truth": ...}, ...]}, questions
                      whose answer follows from the new fact
    locality          optional: the same form, for questions that the edit should not affect

``FIELD_NAMES`` has further names of these fields, which KnowEdit's data sets use. An edit that has
different values under two names of a field is refused. A text may be given as a list of aliases, or
a list of such lists; the first alias is used, as in EasyEdit. A prompt must be one text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.editing.edits import Edit, Edits, Question, QuestionsByKind
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.small_files import unique_keys

FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "subject": ("subject", "concept"),
    "prompt": ("prompt", "text"),
    "target_new": ("target_new", "labels"),
    "rephrase_prompt": ("rephrase_prompt", "rephrase"),
}
"""Field -> the names that it may have in the file.

The first name is used by the ZsRE data set, and in messages. The second is used by WikiBio or
counterfact.
"""
KNOWN_FIELDS = {
    "portability",
    "locality",
    *(name for names in FIELD_NAMES.values() for name in names),
}
REQUIRED = ("subject", "prompt", "target_new")
PLACE_HOLDER = re.compile(r"\{\w*\}|\[[XY]\]|<subject>", re.IGNORECASE)
"""Matches what stands for the subject in prompts of data sets: {}, {subject}, [X]."""
SEPARATORS = re.compile(r"[\s,]*")
MAX_SHOWN = 20
"""Largest number of problems that an error lists. A file with more probably has another format."""


def read_edits(path: Path) -> Edits:
    """Read all edits of a file. Not collective.

    Args:
        path: File with a JSON list of objects, or with one JSON object per line.

    Raises:
        UserError: The file cannot be read, is not JSON, has no edits, or has edits with wrong
            fields. The message names the line and the field of each such problem.
    """
    parser, edits = _EditParser(), []
    for number, (line, record) in enumerate(_records(path), start=1):
        parser.location = f"{path}:{line}: edit {number}"
        if edit := parser.edit(record):
            edits.append(edit)
    if not (edits or parser.problems):
        raise UserError(
            f"{path} has no edits. Give a JSON list of edits, or a file with one edit per line.",
            shared=True,
        )
    if parser.problems:
        raise UserError(_problem_report(path, parser.problems), shared=True)
    return Edits(
        edits=tuple(edits),
        without_answer=parser.without_answer,
        unread=tuple(sorted(parser.unread)),
    )


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each element of a JSON list, or of each JSON line.

    Line numbers count from 1. The values are not checked.

    Raises:
        UserError: The file cannot be read or is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            json.loads(text)  # checks the text between the elements too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--edits {path} cannot be read: {error}. Give a readable UTF-8 file.", shared=True
        ) from error
    except json.JSONDecodeError as error:
        raise _not_json(path, error) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, 1, error) from error
    at, end = _skip_separators(text, 0), len(text)
    if text[at : at + 1] == "[":
        at, end = _skip_separators(text, at + 1), text.rindex("]")
    line, counted_to, decoder = 1, 0, json.JSONDecoder(object_pairs_hook=unique_keys)
    while at < end:
        line, counted_to = line + text.count("\n", counted_to, at), at
        try:
            value, end_of_value = decoder.raw_decode(text, at)
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except json.JSONDecodeError as error:
            raise _not_json(path, error) from error
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, line, error) from error
        yield line, value
        at = _skip_separators(text, end_of_value)


def _skip_separators(text: str, at: int) -> int:
    match = SEPARATORS.match(text, at)
    return match.end() if match else at


def _not_json(path: Path, error: json.JSONDecodeError) -> UserError:
    problem = f"{path}:{error.lineno} is not valid JSON: {error.msg} (column {error.colno})"
    allowed = "Edits must be a JSON list of objects, or one object per line. Correct this line."
    return UserError(f"{problem}. {allowed}", shared=True)


def _unreadable(path: Path, line: int, error: Exception) -> UserError:
    # JSON that is nested too deep, or a number of thousands of digits.
    problem = f"{path}:{line} or a line after it cannot be read: {type(error).__name__}: {error}"
    return UserError(f"{problem}. Correct it, or remove this edit.", shared=True)


def _problem_report(path: Path, problems: Sequence[str]) -> str:
    shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_SHOWN])
    more = len(problems) - MAX_SHOWN
    rest = f"\n  and {more:,} more" if more > 0 else ""
    known = "; ".join(" or ".join(names) for names in FIELD_NAMES.values())
    return (
        f"{path} has {counted(len(problems), 'problem')}:\n{shown}{rest}\n"
        f"Edits must be in KnowEdit's format, with the fields: {known}; locality; portability. "
        "Correct these problems in the file."
    )


class _EditParser:
    """Parses one edit at a time, and collects the problems of all edits.

    A record is the JSON object of an edit.

    Attributes:
        location: File, line and number of the current edit, for messages. The caller sets it.
        problems: Messages about all edits parsed so far.
        without_answer: Number of questions left out because their answer is blank or null.
        unread: Names of fields that are not used.
    """

    def __init__(self) -> None:
        self.location = ""
        self.problems: list[str] = []
        self.without_answer = 0
        self.unread: set[str] = set()

    def edit(self, record: Any) -> Edit | None:
        """Return the edit that a JSON object describes.

        Args:
            record: Value of one element of the file's JSON list, or of one line.

        Returns:
            The edit; None if it has a problem. Messages are then appended to ``problems``.
        """
        before = len(self.problems)
        if not isinstance(record, dict):
            self._add_problem(f"the edit must be an object, got {type(record).__name__}")
            return None
        self.unread |= record.keys() - KNOWN_FIELDS
        given = {name: self._text_of(record, name) for name in FIELD_NAMES}
        by_kind = {
            name: self._by_kind(record.get(name), name) for name in ("portability", "locality")
        }
        self._check_place_holders(given, by_kind)
        if len(self.problems) > before:
            return None
        target, rephrased = given["target_new"], given["rephrase_prompt"]
        return Edit(
            subject=given["subject"],
            fact=Question(prompt=given["prompt"], answer=target),
            rephrased=Question(prompt=rephrased, answer=target) if rephrased else None,
            **by_kind,
        )

    def _check_place_holders(
        self, given: Mapping[str, str], by_kind: Mapping[str, QuestionsByKind]
    ) -> None:
        prompts = [(name, given[name]) for name in ("prompt", "rephrase_prompt")]
        prompts += [
            (f"{name}.{kind}", question.prompt)
            for name, kinds in by_kind.items()
            for kind, questions in kinds.items()
            for question in questions
        ]
        for name, prompt in prompts:
            found = PLACE_HOLDER.search(prompt)
            if found and given["subject"] not in prompt:
                self._add_problem(
                    f"{name} has the place holder {found[0]}, as ROME's files have {{}}: "
                    f"{prompt[:60]!r}. Write the subject there"
                )

    def _text_of(self, record: Mapping[str, Any], name: str) -> str:
        """Return the text of field ``name``, or "" if it is wrong or missing.

        A message is appended to ``problems`` unless the field is optional and missing.

        Args:
            record: The JSON object of the edit.
            name: A key of ``FIELD_NAMES``.
        """
        values = {n: record[n] for n in FIELD_NAMES[name] if _has_text(record.get(n))}
        if len({str(_first_alias(value)) for value in values.values()}) > 1:
            self._add_problem(
                f"{' and '.join(values)} are two names of one field, but have different values. "
                "Remove one of them"
            )
        # A table has null, or an empty text, where an edit has no value in a column.
        given = [*values.values(), *(record[n] for n in FIELD_NAMES[name] if n in record)]
        value = given[0] if given else None
        if _first_alias(value) is None and name in REQUIRED:
            self._add_problem(f"{name} is missing or null, but must be text")
        return self._text(value, name, may_be_blank=name not in REQUIRED) or ""

    def _by_kind(self, value: Any, name: str) -> dict[str, tuple[Question, ...]]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._add_problem(
                f"{name} must be an object {{kind: [questions]}}, got {type(value).__name__}"
            )
            return {}
        found = {}
        for kind, questions in value.items():
            if not isinstance(questions, list | None):
                self._add_problem(
                    f"{name}.{kind} must be a list of questions, got {type(questions).__name__}"
                )
                continue
            each = [self._question(p, f"{name}.{kind}[{i}]") for i, p in enumerate(questions or [])]
            if questions := tuple(question for question in each if question):
                found[kind] = questions
        return found

    def _question(self, value: Any, name: str) -> Question | None:
        if not isinstance(value, dict):
            self._add_problem(f"{name} must be an object, got {type(value).__name__}")
            return None
        for key in ("prompt", "ground_truth"):
            if key not in value:
                self._add_problem(f"{name}.{key} is missing, but every question must have it")
            elif key == "prompt" and _first_alias(value[key]) is None:
                self._add_problem(f"{name}.prompt is null, but must be text")
        prompt = self._text(value.get("prompt"), f"{name}.prompt")
        answer = self._text(value.get("ground_truth"), f"{name}.ground_truth", may_be_blank=True)
        if prompt and not answer:
            self.without_answer += 1
        return Question(prompt=prompt, answer=answer) if prompt and answer else None

    def _text(self, value: Any, name: str, *, may_be_blank: bool = False) -> str | None:
        text = _first_alias(value)
        if text is None:
            return None
        if name.rpartition(".")[2] == "prompt" and _is_several(value):
            self._add_problem(f"{name} must be one text, got a list of several: {str(value)[:40]}")
            return None
        if not isinstance(text, str):
            self._add_problem(f"{name} must be text, got {type(text).__name__}: {str(text)[:40]}")
        elif not text.strip() and not may_be_blank:
            self._add_problem(f"{name} is blank, but must have text")
        return text if isinstance(text, str) and text.strip() else None

    def _add_problem(self, what: str) -> None:
        self.problems.append(f"{self.location}: {what}")


def _first_alias(value: Any) -> Any:
    """Return the first alias of an answer, i.e. the first of several accepted wordings.

    Args:
        value: An alias, a list of aliases, or a list of such lists.

    Returns:
        The first alias; None for an empty list; ``value`` itself if it is no list.
    """
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def _has_text(value: Any) -> bool:
    """Return True unless the value of a field is null or blank."""
    text = _first_alias(value)
    return text is not None and bool(str(text).strip())


def _is_several(value: Any) -> bool:
    """Return True if a value is a list of several aliases."""
    return isinstance(value, list) and (len(value) > 1 or any(map(_is_several, value)))
