"""Knowledge editing by four methods: how many other answers change at equal edit success?

    python benchmarks/knowledge_edit.py

A Llama of three layers first learns a synthetic set of facts in plain PyTorch. Each method then
makes the same edits through ``train.run``, with more steps each time until edit success is 99%.

Shapes: M rows of a batch, T tokens of a row.
"""

import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _job import header, write
from _made_world import World, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparse_lora_dist.editing.answer_tokens import encode
from sparse_lora_dist.editing.edit_command import RESULTS, purpose_of
from sparse_lora_dist.editing.edit_metrics import agreement
from sparse_lora_dist.editing.edit_options import load_request
from sparse_lora_dist.editing.edits import Question
from sparse_lora_dist.export.sparse_delta import write_sparse_delta
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others
from sparse_lora_dist.train import run

SEEDS = (0, 1, 2, 3, 4)
EDITS = 5
STEPS = (25, 50, 100, 200)
ENOUGH = 99.0
"""Edit success in percent at which no more steps are tried."""
RATE = "2e-3"
METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("--method", "lora"),
    "adalora": ("--method", "adalora"),
    "sora": ("--method", "sora"),
    "roselora": ("--method", "roselora", "--roselora_preset", "paper"),
    "roselora, released": ("--method", "roselora"),
}
COLUMNS = ("edit success", "rephrase", "portability", "locality")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one run."""

    steps: int
    after: dict[str, float]
    """Percent, by column."""
    changed: float
    """Percent of the weights of the adapted matrices."""


def main() -> None:
    """One row a method."""
    quiet_others()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(random.Random(0))
        knows = learn(world, folder / "model")
        outcomes: dict[str, list[Outcome]] = {method: [] for method in METHODS}
        for seed in SEEDS:
            edits = folder / f"edits_{seed}.json"
            edits.write_text(json.dumps(world.edits(EDITS, random.Random(seed))))
            for method in METHODS:
                found = edited(method, folder, edits, seed)
                outcomes[method].append(found)
                print(seed, method, found, flush=True)
    write("knowledge_edit.md", report(world, knows, outcomes))
    exit_process(0)


def edited(method: str, folder: Path, edits: Path, seed: int) -> Outcome:
    """In as few of ``STEPS`` as are enough, or in the last."""
    for steps in STEPS:
        flags = ["--model", str(folder / "model"), "--edits", str(edits), "--seed", str(seed)]
        flags += ["--output_dir", str(folder / "run"), "--max_steps", str(steps), *METHODS[method]]
        flags += ["--learning_rate", RATE, "--precision", "fp32", "--quantization", "none"]
        flags += ["--sequence_length", "16", "--micro_batch_size", "16", "--fluency_tokens", "0"]
        flags += ["--log_every", "1000", "--overwrite"]
        request = load_request(flags)
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            run(request.config, purpose_of(request))
        after = json.loads((folder / "run" / RESULTS).read_text())["after"]
        if after["edit success"] >= ENOUGH:
            break
    found = write_sparse_delta(Trained.open(folder / "run"), folder)
    return Outcome(steps=steps, after=after, changed=100 * found.changed / found.weights)


def learn(world: World, folder: Path) -> float:
    """Train until the world is known; the share of answers' tokens that are."""
    tokenizer = save_tokenizer(world, folder)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    batches = batches_of(world.questions(), tokenizer)
    for step, (ids_MT, labels_MT) in enumerate(batches, start=1):
        loss = model(input_ids=ids_MT, labels=labels_MT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
            if (knows := known(model, world.questions(), tokenizer)) > 0.99 or step >= 3000:
                break
    assert knows > 0.95, f"the model knows {knows:.1%} of its world"
    model.save_pretrained(folder)
    return knows


def batches_of(
    questions: list[Question], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids_MT, labels_MT), drawn without end; only answers are learned."""
    rows, numbers = [encode(tokenizer, q) for q in questions], random.Random(0)
    pad_id: Any = tokenizer.pad_token_id
    while True:
        drawn = numbers.sample(rows, 128)
        longest = max(len(row.ids) for row in drawn)
        ids = [row.ids + [pad_id] * (longest - len(row.ids)) for row in drawn]
        labels = [
            [-100] * row.num_prompt + row.answer + [-100] * (longest - len(row.ids))
            for row in drawn
        ]
        yield torch.tensor(ids), torch.tensor(labels)


@torch.no_grad()
def known(
    model: LlamaForCausalLM, questions: list[Question], tokenizer: PreTrainedTokenizerFast
) -> float:
    """Share of the answers' tokens that the model gives."""
    shares = []
    for question in random.Random(1).sample(questions, 400):
        row = encode(tokenizer, question)
        chosen_T = model(input_ids=torch.tensor([row.ids])).logits[0].argmax(-1)
        shares.append(agreement(chosen_T[row.num_prompt - 1 : -1].tolist(), row.answer))
    return mean(shares)


def report(world: World, knows: float, outcomes: dict[str, list[Outcome]]) -> str:
    """The result file."""
    lines = [
        f"`python benchmarks/knowledge_edit.py`: a Llama of 3 layers, width 128, that learned a "
        f"world of {world.size} ({100 * knows:.1f}% of the answers' tokens known), then {EDITS} "
        f"edits at once, {len(SEEDS)} seeds (other edits each): rank 8, alpha 32, dropout 0.1, "
        f"q_proj and v_proj, fp32, learning rate {RATE}, each method's defaults, one rank. Steps: "
        f"the fewest of {', '.join(map(str, STEPS))} with edit success of at least {ENOUGH:g}%. "
        "Percent, mean ± standard deviation over seeds. Portability: composed questions through "
        "the edited fact. Locality: other facts of the subject, and the same relation of others. "
        "Changed: of the weights of the adapted matrices, those whose delta is not zero.",
        "",
        *header("steps", *COLUMNS, "changed", first="method"),
    ]
    for method, runs in outcomes.items():
        cells = [spread([r.after[column] for r in runs]) for column in COLUMNS]
        steps = ", ".join(str(r.steps) for r in runs)
        cells = [steps, *cells, spread([r.changed for r in runs], digits=2)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
