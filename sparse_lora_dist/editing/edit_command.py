"""Runs launcher/edit.py: trains on the edits, then measures the model before and after them.

"Before" is the model with all adapters switched off.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.editing.answer_tokens import (
    EncodedQuestion,
    GreedyDecoder,
    encode,
    without_adapters,
)
from sparse_lora_dist.editing.edit_feed import EditFeed, build_feed
from sparse_lora_dist.editing.edit_metrics import COLUMNS, Scores, table_row
from sparse_lora_dist.editing.edit_options import RESULTS, EditRequest
from sparse_lora_dist.editing.question_scores import ModelAnswers, score_edits, scored_questions
from sparse_lora_dist.errors import as_user_error
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.system.own_files import claim
from sparse_lora_dist.training.feed import open_tokenizer
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.training.own_folder import EDIT
from sparse_lora_dist.training.purpose import Purpose

SUCCESS_HINT_BELOW = 90.0
"""Edit success in percent below which a hint on how to raise it is printed."""


def purpose_of(request: EditRequest) -> Purpose:
    """Return what distinguishes an edit run from a training run.

    An edit run trains on the edits in place of ``--data``, measures the model after the last step,
    and with ``--overwrite`` replaces an earlier run in its folder.

    Args:
        request: The checked options, and the edits to make.
    """
    return Purpose(
        open_feed=partial(_open_feed, request),
        conclude=partial(_conclude, request),
        program=EDIT,
        replaces=request.options.overwrite,
        own=_own_options(request),
    )


def _own_options(request: EditRequest) -> Mapping[str, object]:
    """Return what all ranks must have the same: the editor's options, and the edits themselves.

    The options of training that follow from the edits are left out.
    """
    found = sha256(repr(request.edits).encode(errors="surrogatepass")).hexdigest()[:12]
    return {
        "data": None,
        "gradient_accumulation_steps": None,
        **asdict(request.options),
        "content of --edits": f"{counted(len(request.edits), 'edit')} with the hash {found}",
    }


def _open_feed(request: EditRequest, config: Config, model: Model) -> EditFeed:
    options = request.options
    command = ["launcher/edit.py", "--edits", str(options.edits)]
    command += [] if options.number is None else ["--number", options.number]
    command += ["--fluency_tokens", str(options.fluency_tokens)]
    source = as_user_error(f"--edits {options.edits}", "Check the file.")
    with fail_together("reading the edits"), first_on_its_node(), source:
        feed = build_feed(
            request.edits,
            config,
            model,
            open_tokenizer(config, model),
            program=shlex.join(command),
        )
    batch = f"{feed.accumulation} x {counted(feed.micro_batch_size, 'row')} on each rank"
    print_line(
        "edits", f"{counted(len(feed.rows), 'edit')} of {options.edits}, all in each step: {batch}"
    )
    return feed


def _conclude(request: EditRequest, job: Job) -> None:
    """Measure the model without and with the edits, write edits.json, print scores. Collective.

    Called after the last optimizer step, before the adapter is exported.

    Args:
        request: The options and the edits.
        job: The job that trained on the edits; its model is measured.
    """
    tokenizer = open_tokenizer(job.config, job.model)
    scored = scored_questions(request.edits)
    questions = [encode(tokenizer, one.question) for one in scored]
    decoder = GreedyDecoder(
        engine=job.engine,
        tokenizer=tokenizer,
        pad_id=job.feed.pad_id,
        batch_size=job.feed.micro_batch_size,
    )
    with without_adapters(job.model.adapters):
        before = _model_answers(request, job, decoder, questions)
    after = _model_answers(request, job, decoder, questions)
    targets = [question.answer for question in questions]
    scores = {
        "before": score_edits(scored, targets, before, before),
        "after": score_edits(scored, targets, after, before),
    }
    with fail_together(f"writing {RESULTS}", may_pass=True):
        if comm.rank() == 0:
            texts = {"before": before.texts, "after": after.texts}
            results = _results(request, job, scores, texts)
            text = json.dumps(results, indent=1, ensure_ascii=False)
            claim(job.folder, RESULTS)
            write_whole(job.folder / RESULTS, text + "\n")
    for name in COLUMNS:
        was, now = (_percent(table_row(rows)[name]) for rows in scores.values())
        print_line("edited", f"{name} {now}" if name == "locality" else f"{name} {was} -> {now}")
    if (table_row(scores["after"])["edit success"] or 0.0) < SUCCESS_HINT_BELOW:
        print_line("try", low_success_hint(job.config))


def _model_answers(
    request: EditRequest, job: Job, decoder: GreedyDecoder, questions: Sequence[EncodedQuestion]
) -> ModelAnswers:
    """Return what the model predicts for the questions and generates after the prompts. Collective.

    The generated texts are shortened if the model has fewer positions than they need.

    Args:
        request: The options and the edits, whose prompts are continued.
        job: The job whose model is used.
        decoder: Predicts and generates with this model.
        questions: The tokenised questions of all edits.
    """
    prompts = [edit.fact.prompt for edit in request.edits]
    longest = max(len(ids) for ids in decoder.tokenizer(prompts).input_ids)
    architecture = job.model.module.config.get_text_config()
    positions = getattr(architecture, "max_position_embeddings", None)  # None for ALiBi
    num_tokens = request.options.fluency_tokens
    if positions is not None and num_tokens > positions - longest:
        num_tokens = max(0, positions - longest)
        print_line(
            "note",
            f"texts for fluency have {num_tokens} tokens, not --fluency_tokens "
            f"{request.options.fluency_tokens}: the model has {positions} positions, and the "
            f"longest prompt has {longest} tokens",
        )
    return ModelAnswers(
        predicted=decoder.predicted_answers(questions),
        texts=decoder.generate(prompts, num_tokens) if num_tokens > 0 else (),
    )


def _results(
    request: EditRequest,
    job: Job,
    scores: dict[str, list[Scores]],
    texts: dict[str, Sequence[str]],
) -> dict[str, object]:
    """Return the content of edits.json.

    Args:
        request: Options of the edit run.
        job: The job that trained on the edits.
        scores: "before" or "after" -> scores of each edit, in the order of ``request.edits``.
        texts: "before" or "after" -> generated text of each edit; empty if none were generated.
    """
    edits = [
        {"subject": edit.subject, "prompt": edit.fact.prompt, "target_new": edit.fact.answer}
        | {when: dict(rows[i]) for when, rows in scores.items()}
        | {f"text {when}": each[i] for when, each in texts.items() if each}
        for i, edit in enumerate(request.edits)
    ]
    return {
        "file": request.options.edits,
        "number": request.options.number,
        "method": job.config.adapter.method,
        "steps": job.progress.step,
        **{when: table_row(rows) for when, rows in scores.items()},
        "edits": edits,
    }


def low_success_hint(config: Config) -> str:
    """Return the hint which options to change, to be printed if too few edits succeeded.

    Args:
        config: Options of the edit run.
    """
    hint = "not every edit succeeded. Raise "
    hint += f"--max_steps above {config.train.max_steps} or --learning_rate above "
    hint += f"{config.train.learning_rate:g}"
    if getattr(config.method_options, "roselora_preset", None) == "released":
        hint += ", or set --roselora_preset paper: the released preset clamps weights to a bound "
        hint += "that was chosen for models with billions of weights"
    return hint


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
