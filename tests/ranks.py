"""Real process groups for tests: persistent workers, so that torch and DeepSpeed are imported once,
not per test.

    result_of_each_rank = ranks(2, "tests.work.jobs:losses", flags=[...])

``ranks`` is the fixture of ``conftest.py``. The function named runs on every worker of a gloo group
of that size; what it returns (anything picklable) comes back in rank order; what it raises is
raised here, with its traceback.
"""

import gc
import importlib
import multiprocessing
import os
import socket
import traceback
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

TIMEOUT_S = 240
AFTER_FAILURE_S = 10
CONTEXT = multiprocessing.get_context("forkserver")
# Imported once in the fork server; every worker starts as a fork of it.
CONTEXT.set_forkserver_preload(["tests.work.preloaded"])


def start_context() -> BaseContext:
    """What starts ranks. On a GPU each starts anew: CUDA does not survive a fork, and what the fork
    server imports has begun to use it."""
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return multiprocessing.get_context("spawn") if gpu else CONTEXT


class RankError(AssertionError):
    """A worker's exception, with its traceback as text."""


class RankPool:
    """A process group of ``size`` workers that runs one function after another."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context: Any = start_context()
        self.pipes: list[Connection] = []
        self.workers: list[BaseProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            worker.start()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Call ``"module:function"`` on every rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: list[tuple[bool, Any]] = [(False, "no answer")] * len(self.pipes)
        waiting, patience = {pipe: rank for rank, pipe in enumerate(self.pipes)}, TIMEOUT_S
        while waiting:
            ready = connection.wait(list(waiting), timeout=patience)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                answers[rank] = pipe.recv()
                if not answers[rank][0]:
                    patience = AFTER_FAILURE_S  # the others may wait for it in a collective
        failed = [f"rank {r}: {text}" for r, (ok, text) in enumerate(answers) if not ok]
        if failed:
            raise RankError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    from sparse_lora_dist.distributed import comm
    from sparse_lora_dist.runtime.entry_point import quiet_others

    quiet_others()
    torch.set_num_threads(1)
    comm.start()
    # DeepSpeed collects garbage whenever it makes an engine, and looking through all that torch and
    # transformers imported is a third of a short run.
    gc.freeze()
    while True:
        function, arguments = pipe.recv()
        module, name = function.split(":")
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(**arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
