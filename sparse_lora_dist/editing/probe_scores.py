"""Every question of every edit, and from what the model said to them the numbers of each edit."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.editing.edit_metrics import Scores, agreement, fluency, mean_of_kinds
from sparse_lora_dist.editing.edits import Edit, Probes, Question


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, and the number that it goes into."""

    edit: int
    column: str
    kind: str
    question: Question


@dataclass(frozen=True, kw_only=True)
class ModelAnswers:
    """What the model answered."""

    chosen: Sequence[Sequence[int]]
    """Its first choices at each question's answer."""
    texts: Sequence[str]
    """One an edit, or none at all."""


def asked_of(edits: Sequence[Edit]) -> list[Asked]:
    """Those of all edits."""
    asked = []
    for number, edit in enumerate(edits):
        by_column: dict[str, Probes] = {
            "edit success": {"": (edit.fact,)},
            "rephrase": {"": (edit.rephrased,) if edit.rephrased else ()},
            "portability": edit.portability,
            "locality": edit.locality,
        }
        asked += [
            Asked(edit=number, column=column, kind=kind, question=question)
            for column, kinds in by_column.items()
            for kind, questions in kinds.items()
            for question in questions
        ]
    return asked


def scored(
    asked: Sequence[Asked],
    answers: Sequence[Sequence[int]],
    said: ModelAnswers,
    before: ModelAnswers,
) -> list[Scores]:
    """One row an edit.

    Args:
        answers: right ones, in tokens.
        before: what the model said before the edit, which locality is measured against.
    """
    found: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i, ask in enumerate(asked):
        right = before.chosen[i] if ask.column == "locality" else answers[i]
        found[ask.edit, ask.column][ask.kind].append(agreement(said.chosen[i], right))
    numbers = range(1 + max(ask.edit for ask in asked))
    rows: list[dict[str, float | None]] = [{} for _ in numbers]
    for (number, column), by_kind in found.items():
        rows[number][column] = mean_of_kinds(by_kind)
    for row, text in zip(rows, said.texts, strict=False):
        row["fluency"] = fluency(text)
    return list(rows)
