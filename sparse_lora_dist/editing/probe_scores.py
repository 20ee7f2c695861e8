"""Lists the questions of all edits, and scores each edit from the model's predictions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.editing.edit_metrics import Scores, agreement, fluency, mean_of_kinds
from sparse_lora_dist.editing.edits import Edit, Probes, Question


@dataclass(frozen=True, kw_only=True)
class ScoredQuestion:
    """A question and the score that it counts towards."""

    edit: int
    """Index of the edit."""
    column: str
    """Column of ``edit_metrics.COLUMNS``."""
    kind: str
    """Kind of probe; "" for edit success and rephrase."""
    question: Question
    """The question itself."""


@dataclass(frozen=True, kw_only=True)
class ModelAnswers:
    """What one model predicts and generates."""

    predicted: Sequence[Sequence[int]]
    """Per question: the predicted token ids at the positions of its answer."""
    texts: Sequence[str]
    """Per edit: the text generated from its prompt; empty if fluency is not measured."""


def scored_questions(edits: Sequence[Edit]) -> list[ScoredQuestion]:
    """Return the questions of all edits, edit by edit."""
    found = []
    for number, edit in enumerate(edits):
        by_column: dict[str, Probes] = {
            "edit success": {"": (edit.fact,)},
            "rephrase": {"": (edit.rephrased,) if edit.rephrased else ()},
            "portability": edit.portability,
            "locality": edit.locality,
        }
        found += [
            ScoredQuestion(edit=number, column=column, kind=kind, question=question)
            for column, kinds in by_column.items()
            for kind, questions in kinds.items()
            for question in questions
        ]
    return found


def score_edits(
    questions: Sequence[ScoredQuestion],
    targets: Sequence[Sequence[int]],
    answers: ModelAnswers,
    before: ModelAnswers,
) -> list[Scores]:
    """Compute the scores of each edit.

    Args:
        questions: The questions of all edits.
        targets: Per question: token ids of the right answer.
        answers: What the model to score predicts.
        before: What the model predicted before the edit; locality compares with it.

    Returns:
        The scores of each edit, in the order of the edits.
    """
    found: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i, one in enumerate(questions):
        wanted = before.predicted[i] if one.column == "locality" else targets[i]
        found[one.edit, one.column][one.kind].append(agreement(answers.predicted[i], wanted))
    numbers = range(1 + max(one.edit for one in questions))
    rows: list[dict[str, float | None]] = [{} for _ in numbers]
    for (number, column), by_kind in found.items():
        rows[number][column] = mean_of_kinds(by_kind)
    for row, text in zip(rows, answers.texts, strict=False):
        row["fluency"] = fluency(text)
    return list(rows)
