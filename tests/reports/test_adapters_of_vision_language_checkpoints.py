"""Adapters over a checkpoint whose language model transformers builds alone, such as Qwen3.5's.

Reports: vllm-project/vllm#48019, #34186 and PR #39369, NovaSky-AI/SkyRL#2178: adapters whose names
are those of the language model alone load there and do nothing.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.base_model.architecture import meta_model, read_config
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import find_keys
from sparse_lora_dist.export.peft_adapter import PlainLora, write_peft
from sparse_lora_dist.model.saved_class import SavedClass, find_saved_class
from tests.conftest import Ranks
from tests.export.test_export_program import exported, logits_of
from tests.fixtures.tiny_models import ODD_SIZES, save_family
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import MARKED, byte_tokenizer

SITE = "model.layers.1.self_attn.q_proj"
THEIRS = "model.language_model.layers.1.self_attn.q_proj"
TEXT: dict[str, Any] = {
    "vocab_size": len(byte_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "tie_word_embeddings": False,
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
VISION |= {"out_hidden_size": 32, "patch_size": 4}


@pytest.fixture(scope="module")
def base(model_on_disk: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_5") / "model"
    config = CONFIG_MAPPING["qwen3_5"](
        text_config=TEXT, vision_config=VISION, tie_word_embeddings=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    byte_tokenizer(template=MARKED).save_pretrained(folder)
    return folder


def whole(base: Path) -> PreTrainedModel:
    """The class that config.json names."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
    return model


def saved_class(folder: Path) -> SavedClass | None:
    config, files = read_config(folder, trust_remote_code=False), CheckpointFiles(folder)
    module = meta_model(
        config,
        task="causal_lm",
        dtype=torch.float32,
        attn_implementation=None,
        trust_remote_code=False,
    )
    return find_saved_class(module, config, files, find_keys(module, files))


def test_modules_have_the_names_of_the_class_that_config_json_names(base: Path) -> None:
    found = saved_class(base)
    assert found is not None and found.name == "Qwen3_5ForConditionalGeneration"
    assert found.named(SITE) == THEIRS and found.ours_of(THEIRS) == SITE
    assert found.named(f"{SITE}.weight") == f"{THEIRS}.weight"
    assert found.named("lm_head.weight") == "lm_head.weight"
    names = {name for name, _ in whole(base).named_modules()}
    assert set(found.modules.values()) <= names and len(found.modules) > 10


def test_other_models_keep_their_own_names(model_on_disk: None, tmp_path: Path) -> None:
    for family in ("llama", "qwen3"):
        assert saved_class(save_family(tmp_path / family, family)) is None
    # A class without a language-model head, or that transformers does not know, is not taken.
    for name in ("LlamaModel", "NobodysForCausalLM", "PreTrainedModel"):
        config = json.loads((tmp_path / "llama" / "config.json").read_text())
        text = json.dumps(config | {"architectures": [name]})
        (tmp_path / "llama" / "config.json").write_text(text)
        assert saved_class(tmp_path / "llama") is None
    assert ODD_SIZES["hidden_size"] == config["hidden_size"]


@pytest.mark.parametrize("uniform", [False, True])
def test_peft_over_the_whole_model_takes_the_adapter(
    base: Path, tmp_path: Path, uniform: bool
) -> None:
    found = saved_class(base)
    pair = torch.randn(2, 32), torch.randn(64, 2)
    lora = PlainLora(
        pairs={SITE: pair},
        rank=4,
        alpha=8.0,
        dropout=0.0,
        base=str(base),
        task_type="CAUSAL_LM",
        saved_class=found,
    )
    write_peft(tmp_path, lora, uniform=uniform)
    theirs = logits_of(peft.PeftModel.from_pretrained(whole(base), str(tmp_path)))
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weight = alone.get_parameter(f"{SITE}.weight")
    before = logits_of(alone)
    weight.data += pair[1] @ pair[0] * 2.0
    torch.testing.assert_close(theirs, logits_of(alone), rtol=0, atol=1e-4)
    assert (theirs - before).abs().max() > 1e-3
    if not uniform:
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
        )
        shapes: dict[str, tuple[int, ...]] = {f"{SITE}.lora_a": (2, 32), f"{SITE}.lora_b": (64, 2)}
        assert found is not None
        read = read_peft(str(tmp_path), shapes, rank=2, alpha=4, our_name=found.ours_of)
        assert torch.equal(read[f"{SITE}.lora_a"](0, 64), pair[0].flatten())


def test_a_run_over_it_is_exported_and_evaluated_by_these_names(
    ranks: Ranks, tiny: TinyRun, base: Path, tmp_path: Path
) -> None:
    options = {"model": base, "max_steps": 3, "quantization": "none", "packing": False}
    options |= {"target_modules": "q_proj,down_proj", "modules_to_save": "lm_head"}
    flags = tiny.flags(tmp_path / "run", **options)
    tokens = torch.arange(2 * 24).view(2, 24) * 5 % 250
    (ours,) = ranks(1, "tests.work.run:trained_logits", flags=flags, input_ids_MT=tokens)
    for adapter in (tmp_path / "run" / "adapter", exported(tmp_path / "run", tmp_path / "out")):
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert all(n.startswith("model.language_model.") for n in config["target_modules"])
        theirs = logits_of(peft.PeftModel.from_pretrained(whole(base), str(adapter)))
        assert theirs.numpy() == pytest.approx(ours.numpy(), abs=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    assert logits_of(names["model"].float()).numpy() == pytest.approx(ours.numpy(), abs=1e-4)

    merged = exported(tmp_path / "run", tmp_path / "merged", "--format=merged", "--dtype=fp32")
    about = json.loads((merged / "config.json").read_text())
    assert about["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    for model in (whole(merged), AutoModelForCausalLM.from_pretrained(merged)):
        assert logits_of(model).numpy() == pytest.approx(ours.numpy(), abs=1e-4)

    asked = {"model": base, "adapter": tmp_path / "out", "eval_data": tiny.held_out}
    asked |= {"precision": "fp32", "quantization": "none", "sequence_length": 64}
    words = [w for k, v in asked.items() for w in (f"--{k}", str(v))]
    (by_name,) = ranks(1, "tests.work.eval:evaluate", flags=words)
    words[1:4:2] = [str(merged), "base"]
    words[2] = "--compare"
    (of_merged,) = ranks(1, "tests.work.eval:evaluate", flags=words)
    losses = [
        [line.split()[2] for line in said.splitlines() if " loss  " in line]
        for said in (by_name, of_merged)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 1
