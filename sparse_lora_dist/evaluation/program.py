"""launcher/eval.py: models and data opened and checked, then one model after another evaluated."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_lora_dist import comm, zero3_nvme
from sparse_lora_dist.bounds import seconds_in
from sparse_lora_dist.config import Config
from sparse_lora_dist.data import Documents, be_quiet
from sparse_lora_dist.data.chat import end_of_turn, find_template
from sparse_lora_dist.data.fields import ExampleError
from sparse_lora_dist.engine_config import engine_dict
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import Adapter, load, open_adapter, open_model
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.metrics import METRICS, Measure
from sparse_lora_dist.evaluation.options import EvalConfig, EvalRequest
from sparse_lora_dist.evaluation.questions import Encoder
from sparse_lora_dist.evaluation.results import as_text, results
from sparse_lora_dist.evaluation.scoring import Scorer
from sparse_lora_dist.feed import open_tokenizer, settle_padding
from sparse_lora_dist.folders import write_whole
from sparse_lora_dist.model import Model
from sparse_lora_dist.phases import first_on_its_node, together
from sparse_lora_dist.screen import counted, say
from sparse_lora_dist.zero3 import Engine


@dataclass(frozen=True, kw_only=True)
class Exam:
    """All that does not depend on the adapter."""

    config: Config
    own: EvalConfig
    engine_config: dict[str, Any]
    tokenizer: Any
    stop_ids: list[int]
    items: Mapping[str, Any]
    """What each metric scores."""


def evaluate(request: EvalRequest) -> None:
    """Print, and write, what the request asks. Collective.

    Raises:
        UserError: for whatever the user can mend, on every rank; before a weight is read.
    """
    own = request.own
    # Nothing is kept for a backward that does not come; generation wants its cache of keys.
    model_config = replace(request.config.model, gradient_checkpointing=False)
    config = replace(request.config, model=model_config)
    launch = comm.start(seconds_in(config.run.collective_timeout))
    if launch.world_size > 1:
        say("launch", launch.in_words(comm.num_nodes()))
    with together("checking --output"):
        engine_config = engine_dict(config.run.ds_config, config, comm.world_size())
        _check_place(own.output)
    zero3_nvme.prepare(engine_config)
    adapters = [open_adapter(name) for name in own.names]
    models = [open_model(config, adapter) for adapter in adapters]
    exam = _open_exam(request, config, models[0], engine_config)

    measured = []
    for model, adapter in zip(models, adapters, strict=True):
        measures = _take(exam, model, adapter)
        measured.append((adapter.name, {m.name: m for m in measures}))
    found = results(measured)
    with together(f"writing {own.output}"):
        if comm.rank() == 0:
            print(as_text(found), flush=True)
            if own.output is not None:
                content = json.dumps(_about(exam) | found, indent=1)
                write_whole(Path(own.output), content + "\n")


def _check_place(output: str | None) -> None:
    """Before hours of work: can the file be written?"""
    if output is None or comm.rank() > 0:
        return
    folder = Path(output).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {output}: {folder} cannot be written to")


def _open_exam(
    request: EvalRequest, config: Config, model: Model, engine_config: dict[str, Any]
) -> Exam:
    """Read and tokenise what every metric asks for. Collective."""
    if comm.rank() > 0:
        be_quiet()
    with together("reading the data"), first_on_its_node():
        tokenizer = open_tokenizer(config, model)
        template = find_template(tokenizer, config.data.chat_template)
        encoder = Encoder(tokenizer=tokenizer, template=template, data=config.data)
        table = Table.read(request.source, config.data, request.own.limit)
        items = {
            name: METRICS[name].items(encoder, table, request.own.limit)
            for name in request.own.metrics
        }
        try:
            stop_ids = end_of_turn(tokenizer, template=template)
        except ExampleError as error:
            raise UserError(f"--chat_template: {error}") from error
    for name, chosen in items.items():
        is_text = isinstance(chosen, Documents)
        say(name, chosen.report() if is_text else counted(len(chosen), "question"))
    return Exam(
        config=config,
        own=request.own,
        engine_config=engine_config,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        items=items,
    )


def _take(exam: Exam, model: Model, adapter: Adapter) -> list[Measure]:
    """Load one model, and have it measured by every metric. Collective."""
    say("evaluates", adapter.name)
    load(exam.config, model, adapter, exam.engine_config)
    engine = Engine(model.module, None, exam.engine_config)
    scorer = Scorer(
        engine=engine,
        tokenizer=exam.tokenizer,
        pad_id=settle_padding(model, exam.tokenizer),
        stop_ids=exam.stop_ids,
        batch_size=exam.own.batch_size,
        max_new_tokens=exam.own.max_new_tokens,
    )
    measures = [
        measure
        for name, items in exam.items.items()
        for measure in METRICS[name].measure(name, scorer, items)
    ]
    engine.close()
    return measures


def _about(exam: Exam) -> dict[str, Any]:
    """What was done; nothing that differs from one launch of the same to another."""
    options, data = exam.config.model, exam.config.data
    return {
        "model": options.model,
        "eval_data": data.eval_data or "default",
        "metrics": list(exam.own.metrics),
        "quantization": options.quantization,
        "precision": options.precision,
        "sequence_length": data.sequence_length,
        "batch_size": exam.own.batch_size,
        "max_new_tokens": exam.own.max_new_tokens,
        "limit": exam.own.limit,
    }
