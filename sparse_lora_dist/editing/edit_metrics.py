"""What an edit did, in the numbers of the field (EasyEdit, arXiv:2401.01286; KnowEdit's tables).

    edit success   share of the new answer's tokens that are the model's first choice after
                   "prompt answer", each given those before it (teacher forcing)
    rephrase       the same, after the rephrased prompt
    portability    the same, for questions that follow from the new fact
    locality       share of an unrelated answer's tokens at which the model's first choice is the
                   one it had before the edit, right or wrong
    fluency        of a text that goes on from the prompt: the mean of (2/3) H2 and (4/3) H3, with
                   H the entropy in bits of its bigrams, of its trigrams; times 100 in tables

Probes are averaged within their kind, kinds within the edit, edits in the table, as KnowEdit's
script does; an edit without any is left out of that column. Where we differ from EasyEdit:

- words of a text are what a regular expression finds, not nltk's, which splits "don't" in two;
- texts are the model's first choice each, not drawn among its first five: the same on every
  machine, and more repetitive, so fluency is below EasyEdit's;
- they have ``--fluency_tokens`` tokens beyond the prompt, there 100 with it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean

Scores = Mapping[str, float | None]
"""By the names of ``COLUMNS``; None where there was nothing to measure."""

COLUMNS = ("edit success", "rephrase", "portability", "locality", "fluency")
WORD = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Of entropies of n-grams, by n."""


def agreement(chosen: Sequence[int], tokens: Sequence[int]) -> float:
    """Share of places at which both have the same token."""
    return mean(float(a == b) for a, b in zip(chosen, tokens, strict=True))


def mean_of_kinds(by_kind: Mapping[str, Sequence[float]]) -> float | None:
    """Of each kind's mean; None without any."""
    return mean(map(mean, by_kind.values())) if by_kind else None


def fluency(text: str) -> float:
    """Entropy of a text's bigrams and trigrams; 0 where it has none."""
    words = WORD.findall(text)
    return mean(weight * entropy(list(ngrams(words, n))) for n, weight in WEIGHTS.items())


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every ``n`` words that follow each other."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def entropy(items: Sequence[object]) -> float:
    """Of the items' distribution, in bits."""
    counts = Counter(items).values()
    return -sum(c / len(items) * math.log2(c / len(items)) for c in counts)


def table_row(scores: Sequence[Scores]) -> dict[str, float | None]:
    """Means over edits, in hundredths as tables have them."""
    row: dict[str, float | None] = {}
    for column in COLUMNS:
        found = [value for s in scores if (value := s.get(column)) is not None]
        row[column] = 100 * mean(found) if found else None
    return row
