"""What the workers of ``tests/ranks.py`` run for the tests of evaluation."""

import gc
import io
import weakref
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import torch

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation import eval_command as program
from sparse_lora_dist.evaluation import scoring
from sparse_lora_dist.evaluation.eval_options import load_request
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.system import atomic_files as folders
from tests.work import jobs as work


def evaluate(flags: list[str]) -> str:
    """The program; what it printed."""
    with redirect_stdout(io.StringIO()) as out:
        program.evaluate(load_request(flags))
    return out.getvalue()


def refusal(flags: list[str]) -> str:
    """The message of the user error that it ends with, before a weight is read."""
    unread = AssertionError("a weight was read first")
    where = "sparse_lora_dist.base_model.safetensors_reader.CheckpointFiles.read"
    with patch(where, side_effect=unread):
        return work.complaint(evaluate, flags)


def complaint(flags: list[str]) -> str:
    """The message of the user error that it ends with."""
    return work.complaint(evaluate, flags)


def said(flags: list[str]) -> tuple[list[str], int]:
    """(texts that were generated, in the order of the examples; forwards of this rank)."""
    texts: list[str] = []
    forwards = 0
    take = scoring.Scorer.generate

    def generate(self: scoring.Scorer, prompts: list[list[int]], name: str) -> list[str]:
        def count(*_: object) -> None:
            nonlocal forwards
            forwards += 1

        handle = self.engine.model.register_forward_hook(count)
        texts.extend(take(self, prompts, name))
        handle.remove()
        return texts

    with patch.object(scoring.Scorer, "generate", generate):
        evaluate(flags)
    return texts, forwards


def interrupted(flags: list[str]) -> str:
    """Ended by Ctrl-C in its second batch of answers; what ended it."""
    take, calls = scoring.Scorer._generate, []

    def generate(self: scoring.Scorer, prompts: list[list[int]]) -> list[str]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return take(self, prompts)

    with patch.object(scoring.Scorer, "_generate", generate):
        return _ended(flags)


def unwritten(flags: list[str]) -> str:
    """Ended between writing the file and giving it its name; what ended it."""
    with patch.object(folders.os, "replace", side_effect=OSError("no space left")):
        return _ended(flags)


def _ended(flags: list[str]) -> str:
    try:
        evaluate(flags)
    except (KeyboardInterrupt, UserError) as end:
        return f"{type(end).__name__}: {end}"
    raise AssertionError("nothing ended it")


def shares_alive(flags: list[str]) -> list[int]:
    """Of the models before, whenever one of those compared is loaded."""
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(config: Config, model: Model, *rest: Any) -> None:
        gc.collect()
        alive.append(sum(share() is not None for share in seen))
        load(config, model, *rest)
        seen.extend(weakref.ref(p.ds_tensor) for p in model.module.parameters())

    load = program.load
    with patch.object(program, "load", watched):
        evaluate(flags)
    assert len(seen) > 60
    return alive
