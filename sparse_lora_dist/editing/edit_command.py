"""launcher/edit.py: train on the edits, then ask the model without the adapter and with it."""

import json
import shlex
from collections.abc import Sequence
from functools import partial

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.editing.answer_tokens import Encoded, Speaker, encode, without_adapters
from sparse_lora_dist.editing.edit_feed import EditFeed, feed_of
from sparse_lora_dist.editing.edit_metrics import COLUMNS, Scores, table_row
from sparse_lora_dist.editing.edit_options import RESULTS, EditRequest
from sparse_lora_dist.editing.probe_scores import ModelAnswers, asked_of, scored
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.training.feed import open_tokenizer
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.training.purpose import Purpose

TAKEN = 90.0
"""Edit success, in hundredths, below which a way to more of it is said."""


def purpose_of(request: EditRequest) -> Purpose:
    """What ``train.run`` is to do besides training."""
    return Purpose(
        open_feed=partial(_open_feed, request),
        conclude=partial(_conclude, request),
        replaces=request.options.overwrite,
    )


def _open_feed(request: EditRequest, config: Config, model: Model) -> EditFeed:
    options = request.options
    again = ["launcher/edit.py", "--edits", str(options.edits)]
    again += [] if options.number is None else ["--number", options.number]
    again += ["--fluency_tokens", str(options.fluency_tokens)]
    with fail_together("reading the edits"), first_on_its_node():
        feed = feed_of(
            request.edits,
            config,
            model,
            open_tokenizer(config, model),
            program=shlex.join(again),
        )
    cut = f"{feed.accumulation} x {counted(feed.micro_batch_size, 'row')} on each rank"
    print_line(
        "edits", f"{counted(len(feed.rows), 'edit')} of {options.edits}, all in each step: {cut}"
    )
    return feed


def _conclude(request: EditRequest, job: Job) -> None:
    """Measure it, write it, say it."""
    tokenizer = open_tokenizer(job.config, job.model)
    asked = asked_of(request.edits)
    questions = [encode(tokenizer, ask.question) for ask in asked]
    speaker = Speaker(
        engine=job.engine,
        tokenizer=tokenizer,
        pad_id=job.feed.pad_id,
        batch_size=job.feed.micro_batch_size,
    )
    with without_adapters(job.model.adapters):
        before = _said(request, job, speaker, questions)
    after = _said(request, job, speaker, questions)
    answers = [question.answer for question in questions]
    scores = {
        "before": scored(asked, answers, before, before),
        "after": scored(asked, answers, after, before),
    }
    with fail_together(f"writing {RESULTS}"):
        if comm.rank() == 0:
            texts = {"before": before.texts, "after": after.texts}
            results = _results(request, job, scores, texts)
            text = json.dumps(results, indent=1, ensure_ascii=False)
            write_whole(job.folder / RESULTS, text + "\n")
    for name in COLUMNS:
        was, now = (_in_words(table_row(rows)[name]) for rows in scores.values())
        print_line("edited", f"{name} {now}" if name == "locality" else f"{name} {was} -> {now}")
    if (table_row(scores["after"])["edit success"] or 0.0) < TAKEN:
        print_line("try", how_to_take(job.config))


def _said(
    request: EditRequest, job: Job, speaker: Speaker, questions: Sequence[Encoded]
) -> ModelAnswers:
    prompts = [edit.fact.prompt for edit in request.edits]
    longest = max(len(ids) for ids in speaker.tokenizer(prompts).input_ids)
    architecture = job.model.module.config.get_text_config()
    positions = getattr(architecture, "max_position_embeddings", None)  # ALiBi has no bound
    num_tokens = request.options.fluency_tokens
    num_tokens = num_tokens if positions is None else min(num_tokens, positions - longest)
    return ModelAnswers(
        chosen=speaker.first_choices(questions),
        texts=speaker.texts(prompts, num_tokens) if num_tokens > 0 else (),
    )


def _results(
    request: EditRequest,
    job: Job,
    scores: dict[str, list[Scores]],
    texts: dict[str, Sequence[str]],
) -> dict[str, object]:
    """The content of edits.json."""
    each = [
        {"subject": edit.subject, "prompt": edit.fact.prompt, "target_new": edit.fact.answer}
        | {when: dict(rows[i]) for when, rows in scores.items()}
        | {f"text {when}": said[i] for when, said in texts.items() if said}
        for i, edit in enumerate(request.edits)
    ]
    return {
        "file": request.options.edits,
        "number": request.options.number,
        "method": job.config.adapter.method,
        "steps": job.progress.step,
        **{when: table_row(rows) for when, rows in scores.items()},
        "edits": each,
    }


def how_to_take(config: Config) -> str:
    """What to change where too few edits took."""
    more = f"more --max_steps than {config.train.max_steps}, a higher --learning_rate than "
    more += f"{config.train.learning_rate:g}"
    if getattr(config.method_options, "roselora_preset", None) == "released":
        more += ", or --roselora_preset paper: the released one clamps weights, to a bound that is "
        more += "made for models of billions of them"
    return f"not every edit took: {more}"


def _in_words(value: float | None) -> str:
    return "none asked" if value is None else f"{value:.2f}"
