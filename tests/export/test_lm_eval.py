"""EleutherAI's lm-evaluation-harness opens what a run exports, and chooses as launcher/eval.py.

Its task is local, nothing is downloaded.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.evaluation.test_evaluation import QUESTIONS, flags, numbers, write
from tests.fixtures.tiny_run import TinyRun


def task(data: Path) -> Any:
    """The questions as the tiny model's template renders them."""
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={
            "task": "questions",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: f"<s><|user|>{doc['question']}<|end|>\n<|assistant|>",
            "doc_to_choice": lambda doc: [f"{choice}<|end|>" for choice in doc["choices"]],
            "doc_to_target": lambda doc: doc["answer"],
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )


@pytest.mark.usefixtures("full")
def test_the_harness_chooses_as_we_do(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    run, output = tmp_path / "run", tmp_path / "results.json"
    ranks(2, "tests.work.run:train", flags=tiny.flags(run, quantization="none"))
    places = [
        {"answer": i % 2, **{k: q[k] for k in ("question", "choices")}}
        for i, q in enumerate(QUESTIONS * 4)
    ]
    data = write(tmp_path / "questions.jsonl", places)
    asked = {"adapter": run, "metrics": "choice", "quantization": "none", "eval_data": data}
    ranks(2, "tests.work.eval:evaluate", flags=flags(tiny, **asked, output=output))

    model = HFLM(
        pretrained=str(tiny.model), peft=str(run / "adapter"), dtype="float32", device="cpu"
    )
    found = lm_eval.simple_evaluate(model=model, tasks=[task(data)], bootstrap_iters=0)
    accuracy = found["results"]["questions"]["acc,none"]
    assert numbers(output)["choice"]["value"] == accuracy
    assert 0.0 < accuracy < 1.0, json.dumps(found["results"])
