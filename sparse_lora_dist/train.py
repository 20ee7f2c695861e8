"""The main job, top to bottom: read the data, load the base, inject adapters, train, save,
export."""

import time
from pathlib import Path

from sparse_lora_dist import comm
from sparse_lora_dist.config import Config
from sparse_lora_dist.engine_config import engine_dict
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.feed import open_feed
from sparse_lora_dist.job import Job
from sparse_lora_dist.methods import METHODS, Method
from sparse_lora_dist.model import Model
from sparse_lora_dist.optim import SparseAdamW
from sparse_lora_dist.resume import find_resume
from sparse_lora_dist.run_folder import check_folder
from sparse_lora_dist.shards import Shards
from sparse_lora_dist.step import train_step
from sparse_lora_dist.zero3 import Engine


def run(config: Config) -> None:
    """Fine-tune as ``config`` says. Collective.

    Raises:
        UserError: for whatever the user can mend, on every rank.
    """
    comm.start()
    with comm.together("checking the output folder"):
        engine_config = engine_dict(config.run.ds_config, config, comm.world_size())
        check_folder(Path(config.run.output_dir), config.run.resume)
    model = Model.open(config)
    feed = open_feed(config, model.folder)
    method = _build_method(config, feed.total_steps)
    resume = find_resume(config, model, feed, method)
    row_seeds = model.load(config, method, engine_config)

    optimizer = SparseAdamW(
        model.trainable(),
        lr=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        project=method.project,
    )
    engine = Engine(model.module, optimizer, engine_config)
    shards = Shards(engine, optimizer, method, adapters=model.adapter_tensors())

    job = Job(config, model, feed, engine, shards)
    job.start(resume)
    last_step = min(config.train.stop_after or feed.total_steps, feed.total_steps)
    for step in range(job.progress.step + 1, last_step + 1):
        started = time.perf_counter()
        job.set_learning_rate(step)
        result = train_step(engine, shards, feed.batches(job.progress.rows), row_seeds, step=step)
        job.after_step(
            step, result, seconds=time.perf_counter() - started, is_last=step == last_step
        )
    job.finish()


def _build_method(config: Config, total_steps: int) -> Method:
    try:
        return METHODS[config.adapter.method].build(config.method_options, total_steps)
    except ValueError as error:
        raise UserError(f"--method {config.adapter.method}: {error}") from error
