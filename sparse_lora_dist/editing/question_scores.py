"""Lists the questions of all edits, and scores each edit from the model's predictions.

``edit_metrics.py`` defines the metrics.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.editing.edit_metrics import Scores, agreement, fluency, mean_of_kinds
from sparse_lora_dist.editing.edits import Edit, Question, QuestionsByKind


@dataclass(frozen=True, kw_only=True)
class ScoredQuestion:
    """A question, and the metric of the edit that its score counts towards."""

    edit: int
    """Index of the edit in the sequence passed to ``scored_questions``."""
    column: str
    """Name of the metric, one of ``edit_metrics.COLUMNS``."""
    kind: str
    """Kind of question; "" for edit success and rephrase."""
    question: Question
    """Prompt and right answer."""


@dataclass(frozen=True, kw_only=True)
class ModelAnswers:
    """Predictions and generated texts of one model, before or after the edit."""

    predicted: Sequence[Sequence[int]]
    """Per question: the likeliest token id at each position of its answer."""
    texts: Sequence[str]
    """Per edit: the text generated from its prompt; empty if fluency is not measured."""


def scored_questions(edits: Sequence[Edit]) -> list[ScoredQuestion]:
    """Return the questions of all edits, each with the metric that its score counts towards.

    Args:
        edits: The edits.

    Returns:
        The questions of the first edit, then those of the second, and so on.
    """
    found = []
    for number, edit in enumerate(edits):
        by_column: dict[str, QuestionsByKind] = {
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
        questions: The questions of all edits, from ``scored_questions``.
        targets: Per question: token ids of the right answer.
        answers: Predictions and texts of the model to score.
        before: Predictions of the model before the edit. Locality compares ``answers`` with them.

    Returns:
        For each edit in order: name of a metric -> score; metrics that were not measured are
        missing.
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
