"""Runs in a process in which torch was set otherwise, or in a thread."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.train import Training, training

STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


def losses(flags: list[str], state: str) -> list[float]:
    """The losses of a run under ``state``, and whether torch is set as before."""
    found: list[float] = []

    def work() -> None:
        with STATES.get(state, nullcontext)(), training(load_config(flags)) as now:
            for step in now.steps:
                if state == "eval mode":
                    now.engine._engine.module.eval()
                found.append(now.step(step).loss)

    usual = torch.get_default_dtype()
    if state == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        if state == "thread":
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            work()
        assert torch.get_default_dtype() == (torch.float64 if state == "float64" else usual)
    finally:
        torch.set_default_dtype(usual)
    return found


def after_the_block(flags: list[str]) -> list[str]:
    """What is said to steps that are none, and to one after the block."""
    said: list[str] = []

    def tried(now: Training, step: Any) -> None:
        try:
            now.step(step)
        except UserError as error:
            said.append(str(error))

    with training(load_config(flags)) as now:
        for step in (1.0, True, 2):
            tried(now, step)
        now.step(1)
    tried(now, 2)
    return said
