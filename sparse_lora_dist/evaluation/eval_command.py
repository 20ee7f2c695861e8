"""Runs launcher/eval.py: checks all models and data, then evaluates one model at a time."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from sparse_lora_dist.adapter.same_on_all_nodes import Opened, check_same_on_all_nodes
from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_launch, print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import Adapter, differences_from_training, open_adapters
from sparse_lora_dist.evaluation.eval_metrics import METRICS, Measure
from sparse_lora_dist.evaluation.eval_options import EvalRequest
from sparse_lora_dist.evaluation.eval_set import EvalSet, open_eval_set
from sparse_lora_dist.evaluation.load_model import load, open_model
from sparse_lora_dist.evaluation.results import as_text, example_lines, publish, results
from sparse_lora_dist.evaluation.scoring import Scorer
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.model.prompting import end_ids, generation_settings
from sparse_lora_dist.runtime import watchdog
from sparse_lora_dist.runtime.same_command import check_same_command
from sparse_lora_dist.training.feed import settle_padding
from sparse_lora_dist.zero3 import nvme as zero3_nvme
from sparse_lora_dist.zero3.engine import Engine, check_loss_kernel


def evaluate(request: EvalRequest) -> None:
    """Evaluate all models of a request, print the results and write the result files. Collective.

    Args:
        request: The checked options of the command line.

    Raises:
        UserError: The options, data or adapters are wrong. Raised on every rank, before any
            weight is read.
    """
    own = request.own
    # There is no backward to save memory for, and checkpointing would switch off the key-value
    # cache of generation. Adapter options of a --config run.yaml, e.g. its --init_adapter, do not
    # hold here: --adapter names what is evaluated.
    model_config = replace(request.config.model, gradient_checkpointing=False)
    config = replace(request.config, model=model_config, adapter=AdapterConfig())
    print_launch(comm.start(seconds_in(config.run.collective_timeout)))
    check_same_command(config, asdict(own))
    with fail_together("reading --ds_config"):
        engine_config = engine_dict(config.run.ds_config, config, comm.world_size())
    with fail_together("checking --output and --answers"):
        for flag, path in own.files.items():
            _check_writable(flag, path)
    with _watchdog(config):
        check_loss_kernel()
        zero3_nvme.prepare(engine_config)
        adapters = open_adapters(own.names)
        check_same_on_all_nodes(_opened(adapter) for adapter in adapters)
        opened = [open_model(config, adapter) for adapter in adapters]
        eval_set = open_eval_set(request, config, opened[0][0], engine_config)
        measured = []
        for model, adapter in opened:
            measures = _evaluate_model(eval_set, model, adapter)
            measured.append((adapter.name, {m.name: m for m in measures}))
        _write_results(eval_set, measured)


def _opened(adapter: Adapter) -> Opened:
    return Opened(
        name=f"the adapter {adapter.name}",
        values=adapter.values,
        shapes=adapter.shapes,
        scales=adapter.scales,
    )


def _check_writable(flag: str, path: Path) -> None:
    """Raise UserError if a result file cannot be written. On ranks other than 0, do nothing.

    To be called before the models are evaluated, which may take hours.

    Args:
        flag: Name of the option that names the file, without dashes.
        path: The file. Its folder is created if it is missing.
    """
    if comm.rank() > 0:
        return
    folder = path.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"--{flag} {path} cannot be written, because its folder {folder} is not writable. "
            "Choose another folder."
        )


@contextmanager
def _watchdog(config: Config) -> Iterator[None]:
    """Run the body under a watchdog that ends all ranks if one dies or hangs. Collective.

    The watchdog's message names that rank.

    Args:
        config: Options; ``collective_timeout`` is how long a rank may hang.
    """
    with TemporaryDirectory() as own:
        # All ranks use rank 0's folder. Other nodes cannot see it; they find heartbeats in the
        # process group's store.
        folder = Path(comm.gather_objects(own)[0])
        with watchdog.watched(folder, seconds_in(config.run.collective_timeout)):
            yield
        comm.barrier()


def _write_results(
    eval_set: EvalSet, measured: Sequence[tuple[str, Mapping[str, Measure]]]
) -> None:
    """Print the results on rank 0, and write the files of --output and --answers. Collective.

    Args:
        eval_set: The evaluation data and settings.
        measured: (adapter name, {result name: result}) of each model.
    """
    content, files = results(measured), eval_set.own.files
    with fail_together("writing results", may_pass=True):
        if comm.rank() == 0:
            print(as_text(content), flush=True)
            texts = {}
            if "answers" in files:
                texts["answers"] = example_lines(measured)
            if "output" in files:
                text = json.dumps(eval_set.settings() | content, indent=1, allow_nan=False)
                texts["output"] = text + "\n"
            publish(texts, files, overwrite=eval_set.own.overwrite)
            for path in files.values():
                print_line("written", str(path))


def _evaluate_model(eval_set: EvalSet, model: Model, adapter: Adapter) -> list[Measure]:
    """Load the base with one adapter, and evaluate it with all metrics. Collective.

    Args:
        eval_set: The evaluation data and settings.
        model: The opened model, without weights.
        adapter: The adapter to load into it.

    Returns:
        All results; a metric may have several.
    """
    print_line("evaluates", adapter.name)
    own, tokenizer = eval_set.config, eval_set.tokenizer
    for note in differences_from_training(adapter, own, tokenizer) if comm.rank() == 0 else ():
        print_line("note", note)
    watchdog.set_phase("loading the base", may_be_long=True)
    load(eval_set.config, model, adapter, eval_set.engine_config)
    engine = Engine(model.module, None, eval_set.engine_config)
    scorer = Scorer(
        engine=engine,
        tokenizer=eval_set.tokenizer,
        pad_id=settle_padding(model, eval_set.tokenizer),
        # Where transformers stops too: an export has these tokens in its generation_config.json.
        stop_ids=frozenset(
            [*eval_set.stop_ids, *end_ids(generation_settings(model.folder, model.module))]
        ),
        batch_size=eval_set.own.batch_size,
        max_new_tokens=eval_set.own.max_new_tokens,
        frame=eval_set.frame,
    )
    measures = [
        measure
        for name, items in eval_set.items.items()
        for measure in METRICS[name].measure(name, scorer, items)
    ]
    engine.close()
    return measures
