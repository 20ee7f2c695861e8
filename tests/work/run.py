"""What the workers of ``tests/ranks.py`` run for the tests of whole runs and of packing."""

import io
import os
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import groups
from torch import Tensor

from sparse_lora_dist import methods
from sparse_lora_dist import train as program
from sparse_lora_dist.checkpoint.verify import verify
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.data import Batch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import Look
from sparse_lora_dist.tasks.causal_lm import batch_loss
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.zero3.engine import summed_cross_entropy
from tests.fixtures import toy_method
from tests.fixtures.toy_engine import live_copy
from tests.work import jobs as work


def train(flags: list[str], environment: dict[str, str] | None = None) -> str:
    """The main job; what it printed."""
    # A pool's worker has a past, and that must not be what makes two runs equal.
    torch.manual_seed(torch.seed() % 2**63)
    with (
        patch.dict(os.environ, environment or {}),
        # DeepSpeed makes a node's group once per process, and a pool's worker runs many jobs.
        patch.object(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None),
        redirect_stdout(io.StringIO()) as out,
    ):
        program.run(load_config(flags))
    return out.getvalue()


def train_under_umask(mask: int, flags: list[str]) -> str:
    """The main job, whose new files are closed to those whom ``mask`` leaves out."""
    before = os.umask(mask)
    try:
        return train(flags)
    finally:
        os.umask(before)


def train_and_lose_the_base(flags: list[str], base: Path) -> str:
    """The main job, whose model folder is removed once all is loaded."""
    usual = Job.start

    def start(self: Job, *arguments: Any) -> None:
        shutil.rmtree(base)
        usual(self, *arguments)

    with patch.object(Job, "start", start):
        return train(flags)


def train_as_if(flags: list[str], held_out: dict[int, float]) -> str:
    """The main job, whose held-out losses are these, by step."""

    real = Job.held_out

    def loss(self: Job) -> dict[str, float]:
        return real(self) | {"held_out_loss": held_out[self.progress.step]}

    with patch.object(Job, "held_out", loss):
        return train(flags)


def verified(run: Path) -> str:
    """What ``--verify`` prints, its error last."""
    with redirect_stdout(io.StringIO()) as out:
        try:
            verify(run)
        except UserError as error:
            print(error)
    return out.getvalue()


def refusal(flags: list[str]) -> str:
    """The message of the user error that the main job ends with."""
    return work.complaint(train, flags)


def train_toy(flags: list[str]) -> str:
    """The main job, in a program that knows the toy method too."""
    with patch.dict(methods.METHODS, {"toy": toy_method.TOY}):
        return train(flags)


def train_scaled(flags: list[str], loss_scale: float) -> str:
    """``train_toy`` on a loss times ``loss_scale``."""

    def scaled(*args: Any) -> Tensor:
        return loss_scale * summed_cross_entropy(*args)

    with patch("sparse_lora_dist.tasks.loss_head.summed_cross_entropy", scaled):
        return train_toy(flags)


def finished_job(flags: list[str]) -> Job:
    """Train, and keep what trained."""
    jobs: list[Job] = []

    class Kept(Job):
        def finish(self) -> None:
            super().finish()
            jobs.append(self)

    with patch.object(program, "Job", Kept):
        train(flags)
    return jobs[0]


def trained_logits(flags: list[str], input_ids_MT: Tensor) -> Tensor:
    """Train, then what the engine says to these tokens, each row one document."""
    engine = finished_job(flags).engine
    with engine.evaluating():
        return engine(input_ids=input_ids_MT, use_cache=False).logits.float()


def trained_live_copy(flags: list[str]) -> dict[str, Tensor]:
    """Train, then what forward gathers of everything that trained."""
    return live_copy(finished_job(flags).engine)


def refusal_of_toy(flags: list[str]) -> str:
    """The same, in a program that knows the toy method too."""
    with patch.dict(methods.METHODS, {"toy": toy_method.TOY}):
        return refusal(flags)


def refusal_unlooked(flags: list[str]) -> str:
    """The same, where nothing is known of an architecture before it is loaded."""
    with patch("sparse_lora_dist.model.look.look_at", lambda *arguments: Look()):
        return refusal(flags)


LENGTHS = (13, 8, 20)


def packed_documents(flags: list[str], rows: int = 2) -> dict[str, Any]:
    """How far logits move in each of three packed documents when one of them is changed.

    {"changed": {document: {document: largest difference}}, "as one document": the difference in the
    last document when the first is changed and positions do not restart, "gradient": its norm}
    """
    job = finished_job(flags)
    generator = torch.Generator().manual_seed(comm.rank())
    ids_MT = torch.randint(250, (rows, sum(LENGTHS)), generator=generator)
    restarting_T = torch.cat([torch.arange(n) for n in LENGTHS])
    running_T = torch.arange(sum(LENGTHS))
    documents = torch.arange(sum(LENGTHS)).split(LENGTHS)

    def training_logits(ids_MT: Tensor, positions_T: Tensor) -> Tensor:
        """By the loop's own forward and backward, as a step would have it."""
        batch = Batch(
            input_ids_MT=ids_MT,
            labels_MT=ids_MT.clone(),
            position_ids_MT=positions_T.expand_as(ids_MT),
            rows_M=tuple(range(7, 7 + rows)),
            lengths_M=(sum(LENGTHS),) * rows,
        )
        seen: list[Tensor] = []
        head = job.model.module.get_output_embeddings()
        handle = head.register_forward_hook(
            lambda module, inputs, y: seen.append(inputs[0].detach())
        )
        assert job.engine.model.training
        job.engine.backward(batch_loss(job.engine, batch))
        handle.remove()
        job.engine.step()
        return seen[0].float()

    # Steps must not move the weights between two measurements.
    job.engine.set_learning_rate(lambda born: 0.0)
    base = training_logits(ids_MT, restarting_T)
    changed: dict[int, dict[int, float]] = {}
    for index, places in enumerate(documents):
        other = ids_MT.clone()
        other[:, places] = (other[:, places] + 1) % 250
        moved = (training_logits(other, restarting_T) - base).abs()
        changed[index] = {i: float(moved[:, p].max()) for i, p in enumerate(documents)}

    other = ids_MT.clone()
    other[:, documents[0]] = (other[:, documents[0]] + 1) % 250
    leak = training_logits(other, running_T) - training_logits(ids_MT, running_T)
    return {
        "changed": changed,
        "as one document": float(leak[:, documents[-1]].abs().max()),
        "gradient": job.engine.gradient_norm(),
    }


def refusal_unread(flags: list[str]) -> str:
    """The message of the user error, which must come before a weight is read."""
    unread = AssertionError("a weight was read first")
    with patch(
        "sparse_lora_dist.base_model.safetensors_reader.CheckpointFiles.read", side_effect=unread
    ):
        return refusal(flags)


def refusal_before_data(flags: list[str]) -> str:
    """The same, which must come before the data are tokenised too."""
    unread = AssertionError("the data were read first")
    with patch("sparse_lora_dist.train.open_feed", side_effect=unread):
        return refusal_unread(flags)
