"""Modules trained in full whose name is the end of another module's (ModernVBert: ``head``).

PEFT takes every module whose name ends with one of modules_to_save, and then misses its tensors.
"""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import ModernVBertConfig, ModernVBertForSequenceClassification

from sparse_lora_dist.adapter.peft_agrees import disagreements, taken_by_peft
from sparse_lora_dist.export.peft_adapter import PlainLora, write_peft

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 16}
VISION |= {"patch_size": 4, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model() -> ModernVBertForSequenceClassification:
    config = ModernVBertConfig(text_config=TEXT, vision_config=VISION, num_labels=3)
    return ModernVBertForSequenceClassification(config)


def test_peft_opens_the_adapter_of_such_a_classifier(
    model: ModernVBertForSequenceClassification, tmp_path: Path
) -> None:
    assert [n for n, _ in model.named_modules() if n.endswith("head")][:1] != ["head"]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "text" in n]
    site = model.get_submodule(linears[0])
    full = {
        f"{name}.{k}": torch.full_like(p, 0.5)
        for name in ("head", "classifier")
        for k, p in model.get_submodule(name).named_parameters()
    }
    lora = PlainLora(
        pairs={linears[0]: (torch.ones(2, site.in_features), torch.ones(site.out_features, 2))},
        full=full,
        full_modules=["head", "classifier"],
        rank=2,
        alpha=4.0,
        dropout=0.0,
        base="",
        task_type="SEQ_CLS",
    )
    write_peft(tmp_path, lora)
    with warnings.catch_warnings():
        # What PEFT says of keys that are missing or left over.
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        opened = peft.PeftModel.from_pretrained(model, str(tmp_path))
    wrapped = [n for n, m in opened.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    assert wrapped == ["base_model.model.head", "base_model.model.classifier"]
    merged = opened.merge_and_unload()
    for name, value in full.items():
        assert torch.equal(merged.get_parameter(name), value)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not disagreements(config, {linears[0]: 2}, [*full])
    assert len(disagreements(config, {linears[0]: 2}, ["classifier.weight"])) == 1


def test_what_peft_takes_besides_is_found() -> None:
    module = nn.ModuleDict({"lm_head": nn.Linear(2, 2), "norm": nn.Identity()})
    module["draft"] = nn.ModuleDict({"lm_head": nn.Linear(2, 2), "prenorm": nn.Identity()})
    assert taken_by_peft(module, ["lm_head"], "CAUSAL_LM") == ["draft.lm_head"]
    assert taken_by_peft(module, ["norm"], "CAUSAL_LM") == ["draft.prenorm"]
    assert taken_by_peft(module, ["norm", "lm_head"], "SEQ_CLS") == []
    assert taken_by_peft(module, ["draft"], "CAUSAL_LM") == []
    assert taken_by_peft(module, [], "CAUSAL_LM") == []
