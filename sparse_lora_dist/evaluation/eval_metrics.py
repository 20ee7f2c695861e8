"""Defines the metrics of ``--metrics``.

Each turns the model's losses or its generated texts into one or more results, each with one number
per example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sparse_lora_dist.data import Documents
from sparse_lora_dist.evaluation import questions
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.questions import Encoder, GeneratedQuestion, MultipleChoice
from sparse_lora_dist.evaluation.scoring import Scorer

MakeItems = Callable[[Encoder, Table, int | None], Any]
"""Type of ``Metric.items``: (encoder, table, limit) -> tokenised examples."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One result of a model, kept per example. The value shown is sum(sums) / sum(weights)."""

    name: str
    """Name of the result, e.g. "loss" or "choice_per_token"."""
    sums: Sequence[float]
    """Per example, in the order of the data: its loss in nats summed over tokens, or 1.0 for a
    right and 0.0 for a wrong answer."""
    weights: Sequence[float]
    """Per example: its number of scored tokens for a loss, else 1.0."""
    is_accuracy: bool = True
    """True if each example is right or wrong, false for a loss."""
    texts: Sequence[str] = ()
    """Per example: the model's answer; empty for metrics that do not generate."""
    generated: Sequence[str] = ()
    """Per example: the whole text that the model generated. It also has what the chat template puts
    around an answer, and thoughts before it."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric: how it prepares the examples, and how it measures a model on them."""

    items: MakeItems
    """Function (encoder, table, limit) that returns the tokenised examples of a table.

    ``limit`` is the largest number of examples to use, or None for all. Needs no model. Not
    collective.
    """
    measure: Callable[[str, Scorer, Any], list[Measure]]
    """Function (metric's name, scorer, tokenised examples) that returns one or more results.

    The scorer holds the model that is measured. Collective.
    """
    generates: bool = False
    """True if the model generates text, false if given text is scored."""


def mean_loss(name: str, scorer: Scorer, documents: Documents) -> list[Measure]:
    """Compute the mean loss, in nats per token, over the targets of all documents. Collective.

    Args:
        name: Name of the metric, which the result gets.
        scorer: The model to measure.
        documents: Tokenised examples; their targets are the tokens with a loss.

    Returns:
        A list of one result.
    """
    sums, counts = zip(*scorer.losses(documents, name), strict=True)
    return [Measure(name=name, sums=sums, weights=counts, is_accuracy=False)]


def likelihood_accuracy(
    name: str, scorer: Scorer, choices: Sequence[MultipleChoice]
) -> list[Measure]:
    """Compute the share of questions whose right choice has the lowest loss. Collective.

    Args:
        name: Name of the metric, from which the names of the results are made.
        scorer: The model to measure.
        choices: The questions, each tokenised once with every choice as its answer.

    Returns:
        Two results. ``name`` compares the losses summed over the tokens of each choice
        (lm-evaluation-harness: ``acc``); ``name``_per_token compares the mean losses per token.
    """
    losses = iter(scorer.losses([d for c in choices for d in c.documents], name))
    by_sum, by_mean = [], []
    for one in choices:
        own = [next(losses) for _ in one.documents]
        by_sum.append(_argmin([total for total, _ in own]) == one.right)
        by_mean.append(_argmin([total / count for total, count in own]) == one.right)
    return [_accuracy(name, by_sum), _accuracy(f"{name}_per_token", by_mean)]


def generated_accuracy(
    name: str, scorer: Scorer, items: Sequence[GeneratedQuestion]
) -> list[Measure]:
    """Compute the share of prompts after which the model generates a right answer. Collective.

    Args:
        name: Name of the metric, which the result gets.
        scorer: The model to measure.
        items: The prompts, each with a function that checks the generated text.

    Returns:
        A list of one result, with the generated texts.
    """
    generated = scorer.generate([item.prompt for item in items], name)
    texts = [scorer.frame.answer_in(text) for text in generated]
    is_right = [item.is_right(text) for item, text in zip(items, texts, strict=True)]
    return [replace(_accuracy(name, is_right), texts=texts, generated=generated)]


def _argmin(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _accuracy(name: str, is_right: Sequence[bool]) -> Measure:
    sums, weights = [float(right) for right in is_right], [1.0] * len(is_right)
    return Measure(name=name, sums=sums, weights=weights)


def _of_each(item: Callable[[Encoder, Table, Mapping[str, Any]], Any]) -> MakeItems:
    # The limit is not used: the table holds no more examples than that.
    return lambda encoder, table, limit: table.map(partial(item, encoder))


_Generating = partial(Metric, measure=generated_accuracy, generates=True)
METRICS = {
    "loss": Metric(items=questions.documents, measure=mean_loss),
    "choice": Metric(items=_of_each(questions.choice), measure=likelihood_accuracy),
    "choice_generated": _Generating(items=_of_each(questions.choice_generated)),
    "exact": _Generating(items=_of_each(questions.exact)),
    "gsm8k": _Generating(items=_of_each(questions.gsm8k)),
}
"""Value of ``--metrics`` -> the metric."""
