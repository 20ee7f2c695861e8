"""Classes of an edit: a fact to change, and questions that should or should not change with it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparse_lora_dist.data.reading import shown
from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its answer. The model predicts each token of the answer from those before it."""

    prompt: str
    """Text before the answer."""
    answer: str
    """Text of the answer. A space is put before it if neither it nor the prompt has white space
    there."""


QuestionsByKind = Mapping[str, tuple[Question, ...]]
"""Kind of question -> its questions, which measure side effects of an edit. The file of edits names
the kinds, e.g. Reasoning and Relation_Specificity.
"""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One fact to change."""

    subject: str
    """What the fact is about; only used to name the edit in messages and results."""
    fact: Question
    """The prompt and its new answer, which are trained on."""
    rephrased: Question | None = None
    """Another wording of the prompt, with the same answer."""
    portability: QuestionsByKind = field(default_factory=dict)
    """Questions whose answer follows from the new fact."""
    locality: QuestionsByKind = field(default_factory=dict)
    """Questions that the edit should not affect."""


@dataclass(frozen=True, kw_only=True)
class Edits:
    """Content of a file of edits."""

    edits: tuple[Edit, ...]
    """The edits, in the order of the file."""
    without_answer: int = 0
    """Number of questions left out because their answer is blank or null."""
    unread: tuple[str, ...] = ()
    """Names of fields in the file that are not used."""

    def report(self) -> str:
        """Return one line with the number of edits and, for each kind of portability or locality,
        the number of its questions.

        It also gives the number of questions left out and the names of unused fields, if there are
        any.
        """
        asked: Counter[str] = Counter()
        for edit in self.edits:
            for name in ("portability", "locality"):
                for kind, questions in getattr(edit, name).items():
                    asked[f"{name} {shown([kind])}"] += len(questions)
        rephrased = sum(edit.rephrased is not None for edit in self.edits)
        parts = [counted(len(self.edits), "edit"), f"{rephrased:,} rephrased"]
        parts += [f"{name} {count:,}" for name, count in sorted(asked.items())]
        if self.without_answer:
            parts.append(f"{counted(self.without_answer, 'question')} left out (no answer)")
        if self.unread:
            parts.append(f"fields that are not used: {shown(self.unread)}")
        return "; ".join(parts)


def numbered(edits: Sequence[Edit], number: str | None, place: str) -> tuple[Edit, ...]:
    """Select the edits that ``--number`` names.

    Args:
        edits: All edits of the file.
        number: An index counted from 0 ("7"), a slice ("0:10" or "5:"), or None for all edits.
        place: Name of the file, for the message.

    Returns:
        The selected edits, in the order of the file.

    Raises:
        UserError: The selection is empty, names edits that the file does not have, or has two
            edits of one prompt.
    """
    start, colon, stop = (number or ":").partition(":")
    first = int(start or 0)
    last = int(stop or len(edits)) if colon else first + 1
    if not first < last <= len(edits):
        raise UserError(
            f"--number {number} does not select edits of {place}, which has "
            f"{counted(len(edits), 'edit')}, numbered from 0 to {len(edits) - 1}. Give one of "
            f"these numbers, or a range START:END with START < END <= {len(edits)}.",
            shared=True,
        )
    selected = tuple(edits[first:last])
    _check_prompts(selected, first, place)
    return selected


def _check_prompts(edits: Sequence[Edit], first: int, place: str) -> None:
    """Raise UserError if two edits that are made together have the same prompt.

    Args:
        edits: The selected edits.
        first: Number of the first of them in the file, from 0.
        place: Name of the file.
    """
    seen: dict[str, int] = {}
    for number, edit in enumerate(edits, start=first):
        earlier = seen.setdefault(" ".join(edit.fact.prompt.split()), number)
        if earlier != number:
            before, after = edits[earlier - first].fact.answer, edit.fact.answer
            targets = "the same target_new" if before == after else f"{before!r} and {after!r}"
            raise UserError(
                f"{place}: the edits of --number {earlier} and {number} have the same prompt, with "
                f"{targets}. Edits that are made together need different prompts: remove one, or "
                "select one with --number.",
                shared=True,
            )
