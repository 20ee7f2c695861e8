"""A synthetic data set of facts about invented people, with questions in several wordings."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.editing.edits import Question

FIRST = "Ada Bo Cem Dov Eli Fay Gus Hal Ivo Jan Kai Lea".split()
LAST = "Arno Berg Cole Dorn Eyre".split()
VALUES = {
    "town": "Arlen Brix Calder Dunmore Elst Farrow Gant Hove".split(),
    "trade": "baker smith weaver tanner potter mason carver fisher".split(),
    "colour": "red blue green grey black white amber violet".split(),
    "tool": "hammer needle ladle chisel spade compass".split(),
    "animal": "heron otter badger falcon marten hare".split(),
}
"""By relation. A sixth, friend, leads to other people."""
OF_VALUES = {
    "river": ("town", "Ula Vair Wenn Yar".split()),
    "guild": ("trade", "thread stone flame".split()),
}
"""By relation: what the things above have themselves."""
WORDINGS = (
    "the {r} of {s} is",
    "{s} has the {r}",
    "which {r} has {s} ?",
    "ask for the {r} of {s} :",
)
"""Of which the first is edited and the others rephrase it."""
COMPOSED = ("the {q} of the {r} of {s} is", "which {q} has the {r} of {s} ?")


@dataclass(frozen=True)
class Fact:
    """The ``relation`` of ``subject`` is ``value``."""

    subject: str
    relation: str
    value: str

    def asked(self, wordings: Sequence[str] = WORDINGS) -> list[Question]:
        return [
            Question(prompt=w.format(r=self.relation, s=self.subject), answer=self.value)
            for w in wordings
        ]


class World:
    """60 people with 6 relations each, and 16 things with one."""

    def __init__(self, numbers: random.Random) -> None:
        self.people = [f"{first} {last}" for first in FIRST for last in LAST]
        values = VALUES | {"friend": self.people}
        self.facts = {
            (s, r): Fact(s, r, numbers.choice([v for v in values[r] if v != s]))
            for s in self.people
            for r in values
        }
        self.things = {
            (s, r): Fact(s, r, numbers.choice(names))
            for r, (of, names) in OF_VALUES.items()
            for s in VALUES[of]
        }
        self.size = (
            f"{len(self.people)} people x {len(values)} relations in {len(WORDINGS)} wordings, "
            f"{len(self.things)} facts of things, and questions that compose two"
        )

    def questions(self) -> list[Question]:
        """All that is taught: facts, facts of things, and those composed of two."""
        facts = [*self.facts.values(), *self.things.values()]
        composed = [q for fact in self.facts.values() for q in self.composed(fact, fact.value)]
        return [q for fact in facts for q in fact.asked()] + composed

    def composed(self, fact: Fact, value: str) -> list[Question]:
        """What would follow of ``value`` if the fact had it: two steps from its subject."""
        later = [f for f in self.things.values() if f.subject == value]
        if fact.relation == "friend":
            later = [self.facts[value, r] for r in VALUES]
        return [
            Question(prompt=w.format(q=f.relation, r=fact.relation, s=fact.subject), answer=f.value)
            for f in later
            for w in COMPOSED
        ]

    def edits(self, count: int, numbers: random.Random) -> list[dict[str, Any]]:
        """So many facts to change, of different people, in KnowEdit's format; every other one has
        consequences."""
        subjects = numbers.sample(self.people, count)
        relations = [numbers.choice(("town", "trade", "friend")) for _ in subjects]
        return [
            self._edit(self.facts[s, r], numbers) for s, r in zip(subjects, relations, strict=True)
        ]

    def _edit(self, fact: Fact, numbers: random.Random) -> dict[str, Any]:
        choices = self.people if fact.relation == "friend" else VALUES[fact.relation]
        # Consequences that stay the same would be right without an edit.
        old = {q.answer for q in self.composed(fact, fact.value)}
        better = [
            v
            for v in choices
            if v not in (fact.value, fact.subject)
            and any(q.answer not in old for q in self.composed(fact, v))
        ]
        new = Fact(fact.subject, fact.relation, numbers.choice(better))
        others = [f for f in self.facts.values() if f.subject == fact.subject and f != fact]
        same = [f for f in self.facts.values() if f.relation == fact.relation and f != fact]
        asked = new.asked()
        follows = [q for q in self.composed(new, new.value) if q.answer not in old]
        return {
            "subject": new.subject,
            "prompt": asked[0].prompt,
            "target_new": new.value,
            "rephrase_prompt": numbers.choice(asked[1:]).prompt,
            "portability": {"Reasoning": probes(follows)},
            "locality": {
                "Relation_Specificity": probes([f.asked()[0] for f in others]),
                "Neighborhood": probes([f.asked()[0] for f in numbers.sample(same, 20)]),
            },
        }


def probes(questions: Sequence[Question]) -> list[dict[str, str]]:
    """As a file of edits has them."""
    return [{"prompt": q.prompt, "ground_truth": q.answer} for q in questions]


def save_tokenizer(world: World, folder: Path) -> PreTrainedTokenizerFast:
    """A token a word."""
    words = sorted({w for q in world.questions() for w in f"{q.prompt} {q.answer}".split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", *words])}
    inner = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer
