"""launcher/eval.py: models and data opened and checked, then one model after another evaluated."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import Adapter, open_adapters, unlike_training
from sparse_lora_dist.evaluation.eval_metrics import METRICS, Measure
from sparse_lora_dist.evaluation.eval_options import EvalRequest
from sparse_lora_dist.evaluation.eval_set import EvalSet, open_eval_set
from sparse_lora_dist.evaluation.load_model import load, open_model
from sparse_lora_dist.evaluation.results import as_text, each_example, results
from sparse_lora_dist.evaluation.scoring import Scorer
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.runtime import watchdog
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.training.feed import settle_padding
from sparse_lora_dist.zero3 import nvme as zero3_nvme
from sparse_lora_dist.zero3.engine import Engine


def evaluate(request: EvalRequest) -> None:
    """Print, and write, what the request asks. Collective.

    Raises:
        UserError: for whatever the user can mend, on every rank; before a weight is read.
    """
    own = request.own
    # Nothing is kept for a backward that does not come; generation wants its cache of keys. And
    # what a run began with is not what is evaluated.
    model_config = replace(request.config.model, gradient_checkpointing=False)
    config = replace(request.config, model=model_config, adapter=AdapterConfig())
    launch = comm.start(seconds_in(config.run.collective_timeout))
    if launch.world_size > 1:
        print_line("launch", launch.in_words(comm.num_nodes()))
    with fail_together("reading --ds_config"):
        engine_config = engine_dict(config.run.ds_config, config, comm.world_size())
    with fail_together("checking where results go"):
        for flag, path in own.files.items():
            _check_place(flag, path)
    with _watched(config):
        zero3_nvme.prepare(engine_config)
        adapters = open_adapters(own.names)
        models = [open_model(config, adapter) for adapter in adapters]
        eval_set = open_eval_set(request, config, models[0], engine_config)
        measured = []
        for model, adapter in zip(models, adapters, strict=True):
            measures = _take(eval_set, model, adapter)
            measured.append((adapter.name, {m.name: m for m in measures}))
        _publish(eval_set, measured)


def _check_place(flag: str, path: Path) -> None:
    """Before hours of work: can the file be written?"""
    if comm.rank() > 0:
        return
    folder = path.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--{flag} {path}: {folder} cannot be written to")


@contextmanager
def _watched(config: Config) -> Iterator[None]:
    """Inside, a rank that is gone or stands still ends the others, who say which. Collective."""
    with TemporaryDirectory() as own:
        # That of one rank. Other nodes do not see it, and find heartbeats in the store.
        place = Path(comm.gather_objects(own)[0])
        with watchdog.watched(place, seconds_in(config.run.collective_timeout)):
            yield
        comm.barrier()


def _publish(eval_set: EvalSet, measured: Sequence[tuple[str, Mapping[str, Measure]]]) -> None:
    """Numbers on the screen and in files."""
    found, files = results(measured), eval_set.own.files
    with fail_together("writing results"):
        if comm.rank() == 0:
            print(as_text(found), flush=True)
            if "answers" in files:
                write_whole(files["answers"], each_example(measured))
            if "output" in files:
                content = json.dumps(eval_set.about() | found, indent=1, allow_nan=False)
                write_whole(files["output"], content + "\n")
            for path in files.values():
                print_line("written", str(path))


def _take(eval_set: EvalSet, model: Model, adapter: Adapter) -> list[Measure]:
    """Load one model, and have it measured by every metric. Collective."""
    print_line("evaluates", adapter.name)
    for note in unlike_training(adapter, eval_set.config) if comm.rank() == 0 else ():
        print_line("note", note)
    watchdog.set_phase("loading the base", may_be_long=True)
    load(eval_set.config, model, adapter, eval_set.engine_config)
    engine = Engine(model.module, None, eval_set.engine_config)
    scorer = Scorer(
        engine=engine,
        tokenizer=eval_set.tokenizer,
        pad_id=settle_padding(model, eval_set.tokenizer),
        stop_ids=frozenset(eval_set.stop_ids | ends_of(model.module)),
        batch_size=eval_set.own.batch_size,
        max_new_tokens=eval_set.own.max_new_tokens,
    )
    measures = [
        measure
        for name, items in eval_set.items.items()
        for measure in METRICS[name].measure(name, scorer, items)
    ]
    engine.close()
    return measures


def ends_of(model: Any) -> set[int]:
    """The ids at which a model says itself that it ends."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
