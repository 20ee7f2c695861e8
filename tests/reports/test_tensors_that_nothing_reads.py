"""A base whose files hold more than the model of its config.json reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_lora_dist.base_model.architecture import meta_model, read_config
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.unread_tensors import in_words, unread_tensors
from sparse_lora_dist.base_model.weight_map import find_keys
from tests.fixtures.tiny_models import save_family


@pytest.fixture
def base(model_on_disk: None, tmp_path: Path) -> Path:
    return save_family(tmp_path / "llama", "llama")


def configure(base: Path, **values: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))


def add(base: Path, *names: str) -> None:
    file = base / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(2) for name in names}, file, {"format": "pt"})


def notes(base: Path, task: str = "causal_lm") -> list[str]:
    files = CheckpointFiles(base)
    model = meta_model(
        read_config(base, trust_remote_code=False),
        task=task,
        dtype=torch.float32,
        attn_implementation=None,
        trust_remote_code=False,
    )
    keys = find_keys(model, files)
    return in_words(*unread_tensors(model, files, keys, new_head=task == "seq_cls"))


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
def test_a_base_that_is_read_as_a_whole_has_no_note(base: Path, task: str) -> None:
    assert notes(base, task) == []


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
def test_fewer_layers_in_config_json_than_in_the_files_are_told(base: Path, task: str) -> None:
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    configure(base, num_hidden_layers=layers - 1)
    (said,) = notes(base, task)
    assert "9 tensors of more layers or experts than config.json has" in said
    assert f"model.layers.{layers - 1}." in said


def test_a_tensor_that_nothing_reads_is_named_with_the_count(base: Path) -> None:
    add(base, "model.layers.0.self_attn.gate.weight", "model.layers.1.self_attn.gate.weight")
    (said,) = notes(base)
    assert "2 tensors that the model of config.json does not read" in said
    assert "model.layers.0.self_attn.gate.weight" in said


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.mtp_layers.0.weight",
        "mtp.fc.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.vision_tower.layers.3.weight",
        "multi_modal_projector.linear.weight",
    ],
)
def test_the_usual_ones_are_not_told(base: Path, name: str) -> None:
    add(base, name)
    assert notes(base) == []


def test_another_head_is_not_told_to_a_classifier(base: Path) -> None:
    add(base, "lm_head.extra", "v_head.summary.weight")
    assert notes(base, "seq_cls") == []
    assert len(notes(base)) == 1


def test_layers_that_predict_several_tokens_are_not_told(base: Path) -> None:
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    add(base, f"model.layers.{layers}.mlp.up_proj.weight")
    assert len(notes(base)) == 1
    configure(base, num_nextn_predict_layers=1)
    assert notes(base) == []
