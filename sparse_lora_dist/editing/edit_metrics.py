"""The metrics of knowledge editing (EasyEdit, arXiv:2401.01286; KnowEdit's tables).

    edit success   share of the new answer's tokens that the model predicts (argmax) after the
                   prompt, each given the answer's tokens before it (teacher forcing)
    rephrase       the same share after the rephrased prompt
    portability    the same share for questions whose answer follows from the new fact
    locality       share of the tokens of an unrelated answer at which the model predicts the same
                   token as before the edit, right or wrong
    fluency        of a generated text that continues the prompt: the mean of (2/3) H2 and (4/3)
                   H3, with Hn the entropy of the text's n-grams in bits; tables show 100 times it

As in KnowEdit's script, scores are averaged over the probes of a kind, then over the kinds of an
edit, then over edits; an edit without probes is left out of that column. Differences to EasyEdit:

- a regular expression splits a text into words, and nltk there; "don't" differs;
- texts are generated greedily, and there by sampling from the top five tokens. Ours are the same
  on every machine but more repetitive, so fluency is lower than EasyEdit's;
- a text has ``--fluency_tokens`` tokens after the prompt, there 100 including the prompt.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean

Scores = Mapping[str, float | None]
"""Column of ``COLUMNS`` -> score of one edit; None or missing if there was nothing to measure."""

COLUMNS = ("edit success", "rephrase", "portability", "locality", "fluency")
WORD = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""n -> weight of the entropy of n-grams in fluency."""


def agreement(predicted: Sequence[int], targets: Sequence[int]) -> float:
    """Return the share of positions at which two sequences of equal length have the same token."""
    return mean(float(a == b) for a, b in zip(predicted, targets, strict=True))


def mean_of_kinds(by_kind: Mapping[str, Sequence[float]]) -> float | None:
    """Return the mean over kinds of each kind's mean score; None if there are no kinds."""
    return mean(map(mean, by_kind.values())) if by_kind else None


def fluency(text: str) -> float:
    """Return the weighted entropy of a text's bigrams and trigrams; 0 if it has none."""
    words = WORD.findall(text)
    return mean(weight * entropy(list(ngrams(words, n))) for n, weight in WEIGHTS.items())


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all n-grams of a list of words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def entropy(items: Sequence[object]) -> float:
    """Return the entropy of the items' empirical distribution, in bits."""
    counts = Counter(items).values()
    return -sum(c / len(items) * math.log2(c / len(items)) for c in counts)


def table_row(scores: Sequence[Scores]) -> dict[str, float | None]:
    """Return the mean over edits of each column, in percent; None if no edit has a score."""
    row: dict[str, float | None] = {}
    for column in COLUMNS:
        found = [value for s in scores if (value := s.get(column)) is not None]
        row[column] = 100 * mean(found) if found else None
    return row
