"""Adapters whose files are damaged or hostile, for launcher/eval.py and --init_adapter."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import differences_from_training, open_adapters
from sparse_lora_dist.show.show_command import as_text
from tests.fixtures.tiny_tokenizer import byte_tokenizer

SITE = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "base_model_name_or_path": "owner/base",
}
Adapter = Callable[..., Path]


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """A function that writes a small adapter, with changes to its files."""

    def write(config: object = CONFIG, **tensors: torch.Tensor | None) -> Path:
        own = {"A": torch.zeros(2, 8), "B": torch.zeros(8, 2)} | tensors
        named = {
            f"base_model.model.{SITE}.lora_{half}.weight": tensor
            for half, tensor in own.items()
            if tensor is not None
        }
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter/adapter_config.json").write_text(text)
        save_file(named, tmp_path / "adapter/adapter_model.safetensors")
        return tmp_path / "adapter"

    return write


def said_by_eval(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_adapters([str(folder)])
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_whole_adapter_is_opened(adapter: Adapter) -> None:
    (opened,) = open_adapters([str(adapter())])
    assert (opened.scales, opened.base) == ({SITE: 2.0}, "owner/base")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": None}, "alpha 'lora_alpha' must be a number, got None"),
        ({"lora_alpha": "8"}, "alpha 'lora_alpha' must be a number, got '8'"),
        ({"lora_alpha": float("nan")}, "must be a number, got nan"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha 'q_proj' must be a number"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must map names to numbers"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern must be names or a regular expression"),
        ({"alpha_pattern": {"a{99999999999}": 1}}, "does not compile"),
        ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 1}}, "does not compile"),
        ({"alpha_pattern": {"a" * 30_000: 1}}, "a pattern of 30000 letters"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be text, got 5"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_of_a_config_are_named(
    adapter: Adapter, config: dict[str, Any], said: str
) -> None:
    assert said in said_by_eval(adapter(CONFIG | config))


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "5", '"x"', "{", "", '{"a":' * 100_000, '{"r": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:10],
)
def test_a_config_that_is_no_object_is_refused(adapter: Adapter, text: str) -> None:
    folder = adapter(text)
    assert "is damaged" in said_by_eval(folder)
    with pytest.raises(UserError, match="--init_adapter .* is damaged"):
        read_peft(str(folder), {}, rank=2, alpha=4.0)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"A": torch.zeros(0, 8)}, "lora_a: it was saved without gathering"),
        ({"A": torch.tensor(1.0)}, "has shape [], but must have two sizes"),
        ({"B": torch.zeros(8)}, "has shape [8], but must have two sizes"),
        ({"B": None}, "has only one of lora_A and lora_B"),
    ],
    ids=["rank 0", "scalar", "vector", "half"],
)
def test_tensors_that_are_no_factors_are_refused(
    adapter: Adapter, tensors: dict[str, torch.Tensor | None], said: str
) -> None:
    assert said in said_by_eval(adapter(**tensors))


def test_an_adapter_for_no_module_is_refused(adapter: Adapter) -> None:
    """PEFT: No `target_modules` passed."""
    assert "target_modules" in said_by_eval(adapter(CONFIG | {"target_modules": []}))


def test_show_names_the_shape_of_a_factor_without_an_entry(adapter: Adapter) -> None:
    with pytest.raises(UserError, match=r"has shape \[0, 8\], without an entry"):
        as_text(adapter(A=torch.zeros(0, 8)))


def test_an_adapter_to_start_from_that_lacks_a_half_is_refused(adapter: Adapter) -> None:
    """Its update of that module would be dropped without a word."""
    shapes = {f"{SITE}.lora_a": (2, 8), f"{SITE}.lora_b": (8, 2)}
    with pytest.raises(UserError, match=f"It has no {SITE}.lora_b"):
        read_peft(str(adapter(B=None)), shapes, rank=2, alpha=4.0)


def test_a_tensor_of_an_adapter_to_start_from_that_belongs_to_none_is_named(
    adapter: Adapter,
) -> None:
    shapes = {f"{SITE}.lora_a": (2, 8), f"{SITE}.lora_b": (8, 2)}
    folder = adapter(magnitude_vector=torch.zeros(8))
    with pytest.raises(UserError, match=f"the tensor {SITE}.lora_magnitude_vector.*neither A nor"):
        read_peft(str(folder), shapes, rank=2, alpha=4.0)


def test_a_pattern_that_would_never_end_is_refused_in_seconds(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_lora_dist.system.patterns.MATCH_S", 0.3)
    config = CONFIG | {"alpha_pattern": {".*?" * 12 + "(?:!|x{3})": 8}}
    started = time.monotonic()
    assert "takes longer than 0.3 s to match" in said_by_eval(adapter(config))
    assert time.monotonic() - started < 30


def test_patterns_mean_what_they_mean_to_peft(adapter: Adapter) -> None:
    config = CONFIG | {"alpha_pattern": {"k_proj": 1, "layers\\.0\\..*q_proj": 16, "q_proj": 32}}
    (opened,) = open_adapters([str(adapter(config))])
    assert opened.scales == {SITE: 8.0}


@pytest.mark.parametrize("text", ["[", "- 1", "a: &a [*a]", "\0"])
def test_a_damaged_run_yaml_beside_an_adapter_is_a_note(adapter: Adapter, text: str) -> None:
    folder = adapter()
    (folder.parent / "run.yaml").write_text(text)
    (opened,) = open_adapters([str(folder)])
    *_, note = differences_from_training(opened, Config(), byte_tokenizer())
    assert "run.yaml" in note and "its options are not compared" in note


def test_the_adapter_at_the_root_of_a_folder_counts_before_one_called_adapter(
    tmp_path: Path,
) -> None:
    """huggingface/peft#1059, #718: PEFT keeps further adapters in folders with their names"""
    root, inner = tmp_path, tmp_path / "adapter"
    inner.mkdir()
    for folder, rank in ((root, 2), (inner, 3)):
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        halves = {"lora_A": torch.ones(rank, 4), "lora_B": torch.ones(4, rank)}
        tensors = {f"base_model.model.q.{half}.weight": t for half, t in halves.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
    (adapter,) = open_adapters([str(root)])
    assert adapter.shapes["q.lora_a"] == (2, 4)


@pytest.mark.parametrize("lost", ["A", "B", "AB"])
def test_names_without_the_prefix_of_peft_are_refused(adapter: Adapter, lost: str) -> None:
    """PEFT drops such tensors with a warning; they were applied here."""
    folder = adapter()
    file = folder / "adapter_model.safetensors"
    renamed = {
        name.removeprefix("base_model.model.") if f"lora_{half}" in name else name: tensor
        for name, tensor in load_file(file).items()
        for half in lost[:1]
    }
    save_file(renamed, file)
    assert "without the prefix base_model.model." in said_by_eval(folder)
    with pytest.raises(UserError, match="without the prefix base_model.model."):
        read_peft(str(folder), {}, rank=2, alpha=4.0)
