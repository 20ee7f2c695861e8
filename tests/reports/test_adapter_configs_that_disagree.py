"""An adapter_config.json that names fewer modules than the weights, or another rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file

from sparse_lora_dist.adapter.peft_agrees import disagreements, without_tensors
from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import open_adapters
from sparse_lora_dist.show.show_command import as_text

SITES = [f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in ("q_proj", "v_proj")]
BOTH = ["q_proj", "v_proj"]
ALL: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": BOTH}
DROPPED = [
    {"target_modules": ["q_proj"]},
    {"target_modules": SITES[:3]},
    {"target_modules": r".*\.q_proj"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": r".*\.0\..*"},
]
APPLIED = [
    {},
    {"target_modules": SITES},
    {"target_modules": r".*_proj"},
    {"target_modules": None},
    {"target_modules": "all-linear"},
    {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    {"target_modules": SITES, "layers_to_transform": [0]},
    {"r": 8, "rank_pattern": {"[qv]_proj": 4}},
    {"modules_to_save": []},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {
        f"base_model.model.{site}.lora_{half}.weight": torch.ones(shape)
        for site in SITES
        for half, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    return tmp_path / "adapter"


def write(folder: Path, changes: dict[str, Any]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(ALL | changes))
    return folder


def begins_from(folder: Path, rank: int = 4) -> None:
    halves = {"lora_a": (rank, 8), "lora_b": (8, rank)}
    shapes = {f"{site}.{half}": shape for site in SITES for half, shape in halves.items()}
    read_peft(str(folder), shapes, rank=rank, alpha=8)


@pytest.mark.parametrize("changes", APPLIED, ids=str)
def test_an_adapter_that_peft_applies_whole_is_evaluated(
    folder: Path, changes: dict[str, Any]
) -> None:
    (opened,) = open_adapters([str(write(folder, changes))])
    assert {*opened.scales} == {*SITES}
    assert "note" not in as_text(folder)


@pytest.mark.parametrize("changes", DROPPED, ids=str)
def test_tensors_that_peft_drops_are_never_applied(folder: Path, changes: dict[str, Any]) -> None:
    config = LoraConfig(**{k: v for k, v in (ALL | changes).items() if k != "peft_type"})
    dropped = [site for site in SITES if not check_target_module_exists(config, site)]
    assert dropped
    for use in (lambda f: open_adapters([str(f)]), begins_from):
        with pytest.raises(UserError) as error:
            use(write(folder, changes))
        assert f"tensors of {dropped[0]}" in str(error.value)
        assert "correct this file" in str(error.value)
    assert f"note      it has tensors of {dropped[0]}" in as_text(folder)


@pytest.mark.parametrize(
    "changes", [{"r": 8}, {"r": 0}, {"r": "4"}, {"r": None}, {"rank_pattern": {"q_proj": 2}}]
)
def test_a_rank_that_is_not_that_of_the_tensors_is_refused(
    folder: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="have rank 4, but adapter_config.json says"):
        open_adapters([str(write(folder, changes))])
    shown = as_text(folder)
    assert "LoRA of rank 4, alpha 8" in shown and "note      its tensors of" in shown


def test_a_start_with_the_rank_of_the_config_alone_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="have rank 4, but adapter_config.json says 8"):
        begins_from(write(folder, {"r": 8}), rank=8)


def test_a_module_trained_in_full_without_its_tensor_is_refused(folder: Path) -> None:
    changes = {"modules_to_save": ["lm_head"]}
    for use in (lambda f: open_adapters([str(f)]), begins_from):
        with pytest.raises(UserError, match="modules_to_save of .* names lm_head, but it has no"):
            use(write(folder, changes))


def test_peft_names_two_heads_of_a_classifier_that_has_one() -> None:
    config = ALL | {"modules_to_save": ["classifier", "score"]}
    assert not disagreements(config, {}, ["score.weight"])
    assert len(disagreements(config, {}, ["lm_head.weight"])) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": 5},
        {"target_modules": "("},
        {"exclude_modules": {"a": 1}},
        {"layers_to_transform": ["0"]},
        {"layers_pattern": ["("]},
        {"rank_pattern": [4]},
        {"rank_pattern": {"(": 4}},
    ],
    ids=str,
)
def test_values_that_name_no_modules_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        open_adapters([str(write(folder, changes))])


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        ({}, []),
        ({"target_modules": None}, []),
        ({"target_modules": BOTH}, ["model.layers.1.self_attn.q_proj"]),
        ({"target_modules": r".*q_proj"}, ["model.layers.1.self_attn.q_proj"]),
        ({"target_modules": BOTH, "layers_to_transform": [0]}, []),
        ({"target_modules": SITES[:3]}, ["model.layers.1.self_attn.q_proj"]),
    ],
    ids=str,
)
def test_modules_whose_tensors_are_lost_are_those_that_peft_warns_of(
    config: dict[str, Any], lost: list[str]
) -> None:
    """They were evaluated as in the base without a word."""
    saved = [site for site in SITES if site != "model.layers.1.self_attn.q_proj"]
    assert without_tensors(config, SITES, saved) == lost
    if isinstance(config.get("target_modules"), (list, str)):
        peft = LoraConfig(**config)
        wanted = [site for site in SITES if check_target_module_exists(peft, site)]
        assert [site for site in wanted if site not in saved] == lost
