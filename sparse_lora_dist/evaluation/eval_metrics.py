"""What is measured: a model's scores and answers -> a number for each example."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparse_lora_dist.data import Documents
from sparse_lora_dist.evaluation import questions
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.questions import Choice, Encoder, Prompted
from sparse_lora_dist.evaluation.scoring import Scorer

Items = Callable[[Encoder, Table, int | None], Any]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number: sum(sums) / sum(weights), an entry an example, in their order."""

    name: str
    sums: Sequence[float]
    weights: Sequence[float]
    is_share: bool = True
    """Is each example right or wrong?"""
    said: Sequence[str] = ()
    """What the model answered, where it did."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What one name of ``--metrics`` does."""

    items: Items
    """(encoder, examples, limit) -> what is scored, before a weight is read. No collectives."""
    measure: Callable[[str, Scorer, Any], list[Measure]]
    """(name, model, items) -> numbers. Collective."""
    generates: bool = False
    """Does the model answer in its own words?"""


def loss(name: str, scorer: Scorer, documents: Documents) -> list[Measure]:
    """Nats a token, over the tokens of all documents."""
    sums, counts = zip(*scorer.scores(documents, name), strict=True)
    return [Measure(name=name, sums=sums, weights=counts, is_share=False)]


def likeliest(name: str, scorer: Scorer, choices: Sequence[Choice]) -> list[Measure]:
    """The choice of least -log p, of all its tokens together, and of a token on average."""
    scores = iter(scorer.scores([d for c in choices for d in c.documents], name))
    sums, means = [], []
    for one in choices:
        own = [next(scores) for _ in one.documents]
        sums.append(_least([s for s, _ in own]) == one.right)
        means.append(_least([s / n for s, n in own]) == one.right)
    return [_share(name, sums), _share(f"{name}_per_token", means)]


def generated(name: str, scorer: Scorer, tasks: Sequence[Prompted]) -> list[Measure]:
    """The share of prompts that are answered rightly."""
    texts = scorer.answers([task.prompt for task in tasks], name)
    rights = [t.is_right(text) for t, text in zip(tasks, texts, strict=True)]
    return [_share(name, rights, texts)]


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _share(name: str, rights: Sequence[bool], said: Sequence[str] = ()) -> Measure:
    sums, weights = [float(r) for r in rights], [1.0] * len(rights)
    return Measure(name=name, sums=sums, weights=weights, said=said)


def _each(item: Callable[[Encoder, Table, Mapping[str, Any]], Any]) -> Items:
    """The table is cut to its limit already."""
    return lambda encoder, table, limit: table.make(partial(item, encoder))


_Answered = partial(Metric, measure=generated, generates=True)
METRICS = {
    "loss": Metric(items=questions.documents, measure=loss),
    "choice": Metric(items=_each(questions.choice), measure=likeliest),
    "choice_generated": _Answered(items=_each(questions.choice_generated)),
    "exact": _Answered(items=_each(questions.exact)),
    "gsm8k": _Answered(items=_each(questions.gsm8k)),
}
"""By the name that ``--metrics`` takes."""
