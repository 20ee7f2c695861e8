"""A fact to change, what follows from it, and what has nothing to do with it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, and the answer that is scored token by token."""

    prompt: str
    answer: str


Probes = Mapping[str, tuple[Question, ...]]
"""By kind: Reasoning, Subject_Aliasing, Relation_Specificity ..."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One fact that is to be another."""

    subject: str
    fact: Question
    rephrased: Question | None = None
    portability: Probes = field(default_factory=dict)
    """What follows from the new fact."""
    locality: Probes = field(default_factory=dict)
    """What has nothing to do with it."""


@dataclass(frozen=True, kw_only=True)
class Edits:
    """Those of a file, in its order."""

    edits: tuple[Edit, ...]
    without_answer: int = 0
    """Probes left out because their answer is blank or null."""
    unread: tuple[str, ...] = ()
    """Fields of which nothing is known here."""

    def report(self) -> str:
        """One line of what there is."""
        probes: Counter[str] = Counter()
        for edit in self.edits:
            for name in ("portability", "locality"):
                for kind, questions in getattr(edit, name).items():
                    probes[f"{name} {kind}"] += len(questions)
        rephrased = sum(edit.rephrased is not None for edit in self.edits)
        parts = [counted(len(self.edits), "edit"), f"{rephrased:,} rephrased"]
        parts += [f"{name} {count:,}" for name, count in sorted(probes.items())]
        if self.without_answer:
            parts.append(f"{counted(self.without_answer, 'probe')} left out, without an answer")
        if self.unread:
            parts.append(f"fields that are not read: {', '.join(self.unread)}")
        return "; ".join(parts)


def numbered(edits: Sequence[Edit], number: str | None, place: str) -> tuple[Edit, ...]:
    """Those that ``--number`` names: one ("7"), a range without its end ("0:10"), or all.

    Raises:
        UserError: there is none of that number.
    """
    start, colon, stop = (number or ":").partition(":")
    first = int(start or 0)
    last = int(stop or len(edits)) if colon else first + 1
    if not first < last <= len(edits):
        raise UserError(
            f"--number {number}: {place} has {counted(len(edits), 'edit')}, from 0 to "
            f"{len(edits) - 1}",
            shared=True,
        )
    return tuple(edits[first:last])
