"""Adapters of PEFT whose first values are subtracted from the base, or replace its weights.

Reports: huggingface/transformers#34468, huggingface/peft#1929. B A of such an adapter belongs to
weights that the base's files do not hold.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from sparse_lora_dist.adapter.peft_config import other_kind
from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import open_adapters

CHANGING = ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "a_later_one"]
SITE = "base_model.model.layer"


def adapter(folder: Path, start: object) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": start}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    halves = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    tensors = {f"{SITE}.{half}.weight": t for half, t in halves.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("start", CHANGING)
def test_they_are_refused_by_name_in_eval_and_as_init_adapter(tmp_path: Path, start: str) -> None:
    folder = str(adapter(tmp_path, start))
    shapes = {"layer.lora_a": (2, 4), "layer.lora_b": (4, 2)}
    for refused in (
        lambda: open_adapters([folder]),
        lambda: read_peft(folder, shapes, rank=2, alpha=4),
    ):
        with pytest.raises(UserError) as caught:
            refused()
        assert f"init_lora_weights '{start}'" in str(caught.value)
        assert "path_initial_model_for_weight_conversion" in str(caught.value)


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_plain(start: object) -> None:
    assert other_kind({"peft_type": "LORA", "init_lora_weights": start}) is None
    assert other_kind({"peft_type": "LORA"}) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),  # huggingface/peft#1707
        ("bias", "lora_only"),  # huggingface/peft#3306
        ("trainable_token_indices", [3]),  # huggingface/peft#2898
        ("lora_bias", True),
        ("ensure_weight_tying", True),
    ],
)
def test_fields_that_change_what_peft_computes_are_refused_by_name(
    tmp_path: Path, field: str, value: object
) -> None:
    folder = adapter(tmp_path, True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    for refused in (
        lambda: open_adapters([str(folder)]),
        lambda: read_peft(str(folder), {}, rank=2, alpha=4),
    ):
        with pytest.raises(UserError, match=field):
            refused()


def test_what_peft_itself_saves_of_a_plain_adapter_is_plain() -> None:
    config = LoraConfig(r=2, target_modules=["q"], use_rslora=True, rank_pattern={"q": 4}).to_dict()
    assert other_kind({**config, "peft_type": "LORA", "a_field_of_a_later_peft": 1}) is None


def test_the_weight_of_the_base_beside_an_adapter_of_the_head_is_named(tmp_path: Path) -> None:
    """huggingface/peft#2092: PEFT saves lm_head.base_layer.weight too."""
    folder = adapter(tmp_path, True)
    weights = folder / "adapter_model.safetensors"
    held = {"base_model.model.lm_head.base_layer.weight": torch.ones(4, 4), **load_file(weights)}
    save_file(held, weights)
    with pytest.raises(UserError, match="lm_head.base_layer.weight, a weight of the base"):
        open_adapters([str(folder)])
