"""Adapters of a transformers before 4.52, whose names a vision-language model no longer has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedModel

from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import PlainLora, write_peft
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.tasks.class_head import Head

TEXT = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 16}
VISION |= {"patch_size": 4, "num_attention_heads": 2}
OLD = "language_model.model.layers.1.mlp.up_proj"
NOW = "model.language_model.layers.1.mlp.up_proj"
SHAPES: dict[str, tuple[int, ...]] = {f"{NOW}.lora_a": (2, 32), f"{NOW}.lora_b": (24, 2)}


@pytest.fixture(scope="module")
def model() -> Model:
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    with torch.device("meta"):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    files: Any = SimpleNamespace()
    about: dict[str, Any] = {"folder": Path(), "files": files, "sources": {}, "name": ""}
    return Model(module=module, sites=[], head=Head(), full={}, **about)


def read(folder: Path, model: Model, site: str) -> dict[str, Any]:
    pair = torch.ones(2, 32), torch.ones(24, 2)
    lora = PlainLora(
        pairs={site: pair}, rank=2, alpha=4.0, dropout=0.0, base="", task_type="CAUSAL_LM"
    )
    write_peft(folder, lora)
    return read_peft(str(folder), SHAPES, rank=2, alpha=4.0, our_name=model.our_name)


def test_older_names_are_those_that_the_model_has_now(model: Model, tmp_path: Path) -> None:
    assert read(tmp_path / "old", model, OLD).keys() == SHAPES.keys()
    assert read(tmp_path / "now", model, NOW).keys() == SHAPES.keys()
    assert model.our_name(OLD) == NOW
    assert model.our_name("language_model.lm_head.weight") == "lm_head.weight"


def test_names_of_another_model_are_refused_as_they_are(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the first is decoder.layers.1.up_proj"):
        read(tmp_path, model, "decoder.layers.1.up_proj")
