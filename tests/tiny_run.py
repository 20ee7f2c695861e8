"""A model of 100 thousand random weights and sentences to train it on, written in a moment."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_tokenizer import MARKED, byte_tokenizer

WORDS = "the a red old cat dog ran sat saw on in by hill tree house far away and then".split()


@dataclass(frozen=True)
class TinyRun:
    """Where the model and the data lie."""

    model: Path
    data: Path
    held_out: Path

    def flags(self, output_dir: Path, **options: object) -> list[str]:
        """Command line of a run of a few seconds: four rows a step when two ranks take it."""
        flags: dict[str, object] = {
            "model": self.model,
            "data": self.data,
            "eval_data": self.held_out,
            "output_dir": output_dir,
            "precision": "fp32",
            "sequence_length": 64,
            "micro_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "rank": 4,
            "eval_every": 0,
            "eval_batches": 2,
            "save_every": 0,
            "trackers": "[]",
        } | options
        words = []
        for name, value in flags.items():
            listed = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name}", listed]
        return words


def write_tiny_run(folder: Path) -> TinyRun:
    """A Llama of two layers, a tokenizer of one token a byte, 40 + 6 prompts and responses."""
    tokenizer = byte_tokenizer(template=MARKED)
    # Large random weights: attention that prefers nothing would hide half of the mistakes.
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    numbers = random.Random(0)
    return TinyRun(
        model=folder / "model",
        data=_write(folder / "train.jsonl", 40, numbers),
        held_out=_write(folder / "held_out.jsonl", 6, numbers),
    )


def _write(path: Path, count: int, numbers: random.Random) -> Path:
    lines = [
        json.dumps(
            {
                "prompt": " ".join(numbers.choices(WORDS, k=numbers.randint(1, 3))),
                "response": " ".join(numbers.choices(WORDS, k=numbers.randint(1, 6))),
            }
        )
        for _ in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
