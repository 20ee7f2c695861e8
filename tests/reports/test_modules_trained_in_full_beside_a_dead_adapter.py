"""All components of the adapter are pruned, and a module that was trained in full is not lost."""

import warnings
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file

from sparse_lora_dist.adapter.peft_config import APART, WEIGHTS
from tests.conftest import Ranks
from tests.export.test_export_program import TOKENS_MT, exported, logits_of
from tests.fixtures.reference import whole_model
from tests.fixtures.tiny_run import TinyRun


def test_it_is_in_the_runs_adapter_and_in_every_export(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    options = {"method": "sora", "sora_lambdas": (1e6,), "max_steps": 3, "quantization": "none"}
    flags = tiny.flags(tmp_path / "run", modules_to_save="lm_head", **options)
    (ours,) = ranks(1, "tests.work.run:trained_logits", flags=flags, input_ids_MT=TOKENS_MT)
    base = whole_model(tiny.model, quantization="none")
    assert (logits_of(base) - ours).abs().max() > 1e-2
    for adapter in (tmp_path / "run" / "adapter", exported(tmp_path / "run", tmp_path / "out")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT's, of keys that are missing or left over
            warnings.simplefilter("ignore", FutureWarning)
            base = whole_model(tiny.model, quantization="none")
            theirs = logits_of(peft.PeftModel.from_pretrained(base, str(adapter)))
        assert theirs.numpy() == pytest.approx(ours.numpy(), abs=5e-5)
        pairs = [t for name, t in load_file(adapter / WEIGHTS).items() if "lora_" in name]
        assert len(pairs) == 2 and not any(t.any() for t in pairs)
    uniform = exported(tmp_path / "run", tmp_path / "uniform", "--uniform_rank")
    assert list(load_file(uniform / APART)) == ["lm_head.weight"]
