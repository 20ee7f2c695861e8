"""Five made edits, and what the workers of ``tests/ranks.py`` run for ``test_editing.py``."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_lora_dist.editing.answer_tokens import GreedyDecoder
from sparse_lora_dist.editing.edit_command import purpose_of
from sparse_lora_dist.editing.edit_options import RESULTS, load_request
from sparse_lora_dist.train import run
from sparse_lora_dist.training.feed import open_tokenizer
from sparse_lora_dist.training.job import Job
from tests.work import jobs as work


def made(subject: str, relation: str, target: str, **more: Any) -> dict[str, Any]:
    return {
        "subject": subject,
        "prompt": f"The {relation} of {subject} is",
        "target_new": target,
        "ground_truth": ["old"],
        "rephrase_prompt": f"{subject}'s {relation}?",
        "cond": f"old >> {target}",
        **more,
    }


def probe(prompt: str | None, *answers: Any) -> dict[str, Any]:
    return {"prompt": prompt, "ground_truth": answers[0] if len(answers) == 1 else list(answers)}


FIVE: list[dict[str, Any]] = [
    made(
        "Ada",
        "dog",
        "Rex",
        locality={
            "Relation_Specificity": [probe("Ada's cat", ["Tom"]), probe("Ada's car", ["VW"])]
        },
        portability={"Reasoning": [probe("What barks at Ada's?", "Rex")]},
    ),
    made(
        "Bo",
        "hat",
        "red",
        locality={
            "Relation_Specificity": [probe("Bo's tie", "blue")],
            "Forgetfulness": [probe("The sky is", [["blue", "azure"]])],
        },
        portability={"Subject_Aliasing": [probe("The hat of Bob is", [["red", "crimson"]])]},
    ),
    made("Cy", "town", "Ulm", locality=None, portability={}),
    made("Di", "job", "vet", rephrase_prompt=None, locality={"Relation_Specificity": []}),
    made(
        "Eve",
        "age",
        "40",
        portability={
            "Reasoning": [probe("Next year Eve is", "41"), probe("Eve is no longer", "39")],
            "Logical_Generalization": [probe("Who is 40?", "Eve"), probe("Blank?", " ")],
        },
    ),
]
"""Of all forms that KnowEdit has: aliases, lists of them, null, an empty kind, a blank answer."""


def edit(flags: list[str]) -> dict[str, Any]:
    """The results that rank 0 wrote, and what was said."""
    with redirect_stdout(io.StringIO()) as out:
        request = load_request(flags)
        run(request.config, purpose_of(request))
    results = json.loads((Path(request.run.output_dir) / RESULTS).read_text())
    return {**results, "said": out.getvalue()}


def stopped(flags: list[str]) -> None:
    """An edit that ends before its last step."""
    request = load_request(flags)
    run(request.config, purpose_of(request))


def complaint(flags: list[str]) -> str:
    """The message of the user error that it ends with."""
    return work.complaint(stopped, flags)


def said_after(flags: list[str], prompts: list[str], num_tokens: int) -> list[str]:
    """What a finished edit's model says after these prompts."""
    request, said = load_request(flags), list[str]()

    def ask(job: Job) -> None:
        decoder = GreedyDecoder(
            engine=job.engine,
            tokenizer=open_tokenizer(job.config, job.model),
            pad_id=job.feed.pad_id,
            batch_size=2,
        )
        said.extend(decoder.generate(prompts, num_tokens))

    run(request.config, replace(purpose_of(request), conclude=ask))
    return said


def silent_logits_are_the_bases(flags: list[str]) -> bool:
    """Does the model answer bit for bit as before, once its deltas are silent?"""
    import torch

    from sparse_lora_dist.editing.answer_tokens import without_adapters
    from tests.work.run import finished_job

    job = finished_job(flags)
    ids = torch.arange(40)[None] * 3 % 250

    def logits() -> torch.Tensor:
        with job.engine.evaluating():
            return job.engine(input_ids=ids, use_cache=False).logits.float()

    spoken = logits()
    with without_adapters(job.model.adapters):
        first = logits()
    for adapter in job.model.adapters:
        adapter.forward = adapter.base.forward  # type: ignore[method-assign]
    return torch.equal(first, logits()) and not torch.equal(first, spoken)
