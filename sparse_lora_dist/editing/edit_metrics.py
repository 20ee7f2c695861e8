"""The metrics of knowledge editing (EasyEdit, arXiv:2401.01286; KnowEdit's tables).

    edit success   share of the new answer's tokens that the model predicts (argmax) after the
                   prompt, each given the answer's tokens before it (teacher forcing)
    rephrase       the same share after the rephrased prompt
    portability    the same share for questions whose answer follows from the new fact
    locality       share of the tokens of an unrelated answer at which the model predicts the same
                   token as before the edit, right or wrong
    fluency        mean of (2/3) H2 and (4/3) H3 of a generated text that continues the prompt,
                   with Hn the entropy of the text's n-grams (runs of n words) in bits

The four shares are in [0, 1] per edit. Tables show 100 times the mean of each metric, fluency
included.

The data set sorts an edit's questions of portability and of locality into kinds. As in KnowEdit's
script, scores are averaged over the questions of a kind, then over the kinds of an edit, then over
edits. An edit without questions for a metric is left out of that metric's mean.

Differences to EasyEdit:

- A regular expression splits a text into words. EasyEdit uses nltk, which splits e.g. "don't"
  in another way.
- Texts are generated greedily, so that they are the same on every machine. EasyEdit samples from
  the top five tokens. Greedy texts are more repetitive, so fluency is lower than EasyEdit's.
- No space is put between a prompt and its answer where one of them has white space already.
- A text has ``--fluency_tokens`` tokens after the prompt. EasyEdit's has 100 including the prompt.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean

Scores = Mapping[str, float | None]
"""Name of a metric, one of ``COLUMNS`` -> score of one edit.

A score is None or missing if there was nothing to measure.
"""

COLUMNS = ("edit success", "rephrase", "portability", "locality", "fluency")
"""Names of the metrics, as in edits.json and in the printed table."""
WORD = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""n -> weight of the entropy of n-grams in fluency."""


def agreement(predicted: Sequence[int], targets: Sequence[int]) -> float:
    """Return the share of positions at which two sequences of equal length have the same token.

    Args:
        predicted: Token ids that the model predicts.
        targets: Token ids to compare with; at least one.

    Returns:
        The share, in [0, 1].
    """
    return mean(float(a == b) for a, b in zip(predicted, targets, strict=True))


def mean_of_kinds(by_kind: Mapping[str, Sequence[float]]) -> float | None:
    """Average the scores within each kind of question, then over the kinds.

    Args:
        by_kind: Kind of question -> scores of its questions.

    Returns:
        The average; None if there are no kinds.
    """
    return mean(map(mean, by_kind.values())) if by_kind else None


def fluency(text: str) -> float:
    """Return the mean of (2/3) H2 and (4/3) H3 of a text, with Hn the entropy of its n-grams.

    An n-gram is a run of n consecutive words. Entropies are in bits. A text of fewer than two words
    has fluency 0.
    """
    words = WORD.findall(text)
    return mean(weight * entropy(list(ngrams(words, n))) for n, weight in WEIGHTS.items())


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of ``n`` consecutive words, as tuples, in the order of the text."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def entropy(items: Sequence[object]) -> float:
    """Return the entropy in bits of how often each distinct item occurs; 0 without items."""
    counts = Counter(items).values()
    return -sum(c / len(items) * math.log2(c / len(items)) for c in counts)


def table_row(scores: Sequence[Scores]) -> dict[str, float | None]:
    """Average the scores of all edits.

    Args:
        scores: The scores of each edit.

    Returns:
        Name of each metric in ``COLUMNS`` -> 100 times the mean score over the edits that have one;
        None if no edit has one.
    """
    row: dict[str, float | None] = {}
    for column in COLUMNS:
        found = [value for s in scores if (value := s.get(column)) is not None]
        row[column] = 100 * mean(found) if found else None
    return row
