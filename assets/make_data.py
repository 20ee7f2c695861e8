"""Which text the default base model and its fine-tuning set are made of.

GSM8K's training file is cut into four disjoint runs of lines, so that the fine-tuning problems are
new to the base model; Shakespeare is cut into two at one line. Line numbers count from 1.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PRETRAIN_LINES = range(1, 3001)
UNSEEN_LINES = range(3001, 3201)
FINETUNE_LINES = range(3201, 5201)
HELDOUT_LINES = range(5201, 5401)
SHAKESPEARE_UNSEEN_FROM = 38_001
"""First line of Shakespeare that the base model never sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One line of GSM8K: a question and its worked answer, as published."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Everything the base model reads (``pretrain``) or is measured on (``unseen``)."""

    shakespeare_pretrain: str
    shakespeare_unseen: str
    gsm8k_pretrain: list[str]
    """One problem per entry, plain running text on one line."""
    gsm8k_unseen: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetuning:
    """Problems for fine-tuning, none of which shares its wording with another part."""

    train: list[Problem]
    heldout: list[Problem]


def cut(shakespeare: Path, gsm8k: Path) -> tuple[Texts, Finetuning]:
    """The parts named by the constants above, without repeated problems."""
    problems = read_problems(gsm8k)
    lines = shakespeare.read_text(encoding="utf-8").split("\n")
    seen: set[str] = set()
    gsm8k_pretrain = list(new_problems(problems, PRETRAIN_LINES, seen))
    gsm8k_unseen = list(new_problems(problems, UNSEEN_LINES, seen))
    finetuning = Finetuning(
        heldout=list(new_problems(problems, HELDOUT_LINES, seen)),
        train=list(new_problems(problems, FINETUNE_LINES, seen)),
    )
    texts = Texts(
        shakespeare_pretrain="\n".join(lines[: SHAKESPEARE_UNSEEN_FROM - 1]),
        shakespeare_unseen="\n".join(lines[SHAKESPEARE_UNSEEN_FROM - 1 :]),
        gsm8k_pretrain=[running_text(p) for p in gsm8k_pretrain],
        gsm8k_unseen=[running_text(p) for p in gsm8k_unseen],
    )
    return texts, finetuning


def read_problems(gsm8k: Path) -> list[Problem]:
    with gsm8k.open(encoding="utf-8") as file:
        return [Problem(**json.loads(line)) for line in file]


def new_problems(problems: list[Problem], lines: range, seen: set[str]) -> Iterator[Problem]:
    """Those of ``lines`` whose wording is not in ``seen`` yet; adds them to ``seen``."""
    for line in lines:
        problem = problems[line - 1]
        if wording(problem.question) not in seen:
            seen.add(wording(problem.question))
            yield problem


def wording(question: str) -> str:
    """The question without case, punctuation and the value of its numbers.

    The same story with other numbers is the same problem to us: GSM8K has a few such pairs.
    """
    words = re.sub(r"[^a-z0-9]+", " ", question.lower())
    return re.sub(r"[0-9]+", "0", words).strip()


def running_text(problem: Problem) -> str:
    """Question and answer in one line, without calculator marks and the ``####`` result line.

    The base model must not know the form of the fine-tuning set, or there is little left to learn.
    """
    answer, _, _ = problem.answer.partition("\n####")
    answer = re.sub(r"<<[^>]*>>", "", answer)
    # split() also swallows U+2028, which would break "one problem per line".
    return " ".join(f"{problem.question} {answer}".split())


def write_finetuning(finetuning: Finetuning, folder: Path) -> None:
    """``train.jsonl`` and ``heldout.jsonl``, one ``{"prompt", "response"}`` object per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", finetuning.train), ("heldout", finetuning.heldout)):
        rows = ({"prompt": p.question, "response": p.answer} for p in problems)
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    # newline="" keeps the bytes the same on every system, so that hashes can be compared.
    path.write_text(text, encoding="utf-8", newline="")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
