"""An adapter on an output head that is tied to the input embeddings changes the head alone.

Reports: huggingface/peft#2018, #2777 and PR #2972, huggingface/transformers#45127,
thinking-machines-lab/tinker-cookbook#593.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_lora_dist.export.sparse_delta import apply_sparse_delta
from tests.conftest import Ranks
from tests.export.test_export_program import TOKENS_MT, exported, logits_of, whole_weights
from tests.fixtures.tiny_models import save_llama
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import MARKED, byte_tokenizer

LOGITS = "tests.work.run:trained_logits"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_base(folder: Path, *, twice: bool) -> Path:
    """A model with tied embeddings, whose files hold the tensor once or twice."""
    tokenizer = byte_tokenizer(template=MARKED)
    save_llama(folder, tied=True, vocab_size=len(tokenizer), max_position_embeddings=256)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert HEAD not in tensors
    if twice:
        save_file(tensors | {HEAD: tensors[EMBEDDINGS].clone()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("twice", [False, True])
def test_every_export_computes_the_trained_logits(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, twice: bool
) -> None:
    base = tied_base(tmp_path / "base", twice=twice)
    options: dict[str, Any] = {"model": base, "target_modules": "q_proj,lm_head", "max_steps": 4}
    options |= {"quantization": "none", "rank": 2}
    flags = tiny.flags(tmp_path / "run", **options)
    (ours,) = ranks(1, LOGITS, flags=flags, input_ids_MT=TOKENS_MT)

    def untrained() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    assert (logits_of(untrained()) - ours).abs().max() > 1e-2
    adapter = exported(tmp_path / "run", tmp_path / "peft")
    theirs = logits_of(peft.PeftModel.from_pretrained(untrained(), str(adapter)))
    assert theirs.numpy() == pytest.approx(ours.numpy(), abs=5e-5)

    merged = exported(tmp_path / "run", tmp_path / "merged", "--format=merged", "--dtype=fp32")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert logits_of(model).numpy() == pytest.approx(ours.numpy(), abs=1e-4)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    weights = whole_weights(merged)
    assert torch.equal(weights[EMBEDDINGS], whole_weights(base)[EMBEDDINGS].float())
    assert not torch.equal(weights[HEAD], weights[EMBEDDINGS])
    assert "| untied | lm_head.weight was trained" in (merged / "README.md").read_text()
    asked = ["--model", str(merged), "--eval_data", str(tiny.held_out), "--precision", "fp32"]
    asked += ["--quantization", "none", "--sequence_length", "64", "--limit", "2"]
    ranks(1, "tests.work.eval:evaluate", flags=asked)  # our own loader opens it

    delta = exported(tmp_path / "run", tmp_path / "delta", "--format", "sparse_delta")
    model = untrained()
    applied = apply_sparse_delta(model, delta)
    assert logits_of(model).numpy() == pytest.approx(ours.numpy(), abs=1e-4)
    shutil.rmtree(tmp_path / "merged")
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again), logits_of(model)), "saved, both weights are there"
    applied.undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits_of(model), logits_of(untrained()))
