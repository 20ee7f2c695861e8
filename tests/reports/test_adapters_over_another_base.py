"""An adapter that is given to --init_adapter or --adapter is of the base that it is used over.

Reports: huggingface/peft#1932 and the like.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import open_adapters
from sparse_lora_dist.run_folder.identity import TRAINED_OVER, Identity
from sparse_lora_dist.training.trained_over import check_base, check_init_adapter

PREFIX = "base_model.model.layer.lora_"
SHAPES: dict[str, tuple[int, ...]] = {"layer.lora_a": (2, 4), "layer.lora_b": (4, 2)}


def adapter(
    folder: Path, *, base: object = "org/base", halves: str = "AB", **more: torch.Tensor | str
) -> str:
    """``more``: tensors by the last names of their modules, and values of the configuration."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
    config |= {name: value for name, value in more.items() if isinstance(value, str)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    save_file(
        {f"{PREFIX}{half}.weight": tensors[half] for half in halves}
        | {f"base_model.model.{n}.weight": x for n, x in more.items() if not isinstance(x, str)},
        folder / "adapter_model.safetensors",
    )
    return str(folder)


def over(weights: str, name: str = "/models/base") -> Any:
    """A model with these weights, opened."""
    found = SimpleNamespace(weights=weights, config="c")
    return SimpleNamespace(fingerprint=found, name=name, files=SimpleNamespace(entries={}))


def export_over(folder: Path, weights: str) -> str:
    text = Identity(weights=weights, config="c").of_base(in_4_bits=False)
    (folder / TRAINED_OVER).write_text(text)
    return adapter(folder)


def test_an_export_goes_on_over_its_own_base_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_over(tmp_path, "one")
    for check in (check_base, check_init_adapter):
        check(folder, over("one", name="/another/place"))
        with pytest.raises(UserError, match="was trained over another base than --model /models"):
            check(folder, over("two"))
    assert capsys.readouterr().out == "", "the names may differ where the contents are the same"


def test_an_adapter_of_peft_is_compared_by_its_bases_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_init_adapter(adapter(tmp_path), over("one", name="/models/base"))
    assert capsys.readouterr().out == ""
    check_init_adapter(adapter(tmp_path), over("one", name="/models/other"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "the base model of the adapter is org/base, but --model is /models/other" in said


@pytest.mark.parametrize("base", [None, "", 5, ["a"]])
def test_an_adapter_that_names_no_base_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], base: object
) -> None:
    check_init_adapter(adapter(tmp_path, base=base), over("one"))
    check_init_adapter("org/on-the-hub", over("one"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("halves", ["A", "B"])
def test_an_adapter_with_half_of_a_module_is_refused(tmp_path: Path, halves: str) -> None:
    folder = adapter(tmp_path, halves=halves)
    with pytest.raises(UserError, match="would be lost. Export it again"):
        read_peft(folder, SHAPES, rank=2, alpha=4)
    with pytest.raises(UserError, match="has only one of lora_A and lora_B"):
        open_adapters([folder])


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, halves="")
    with pytest.raises(UserError, match="has no tensors, so it is the base itself"):
        open_adapters([folder])
    with pytest.raises(UserError, match="differ in 1 modules"):
        read_peft(folder, SHAPES, rank=2, alpha=4)


@pytest.mark.parametrize(
    ("config", "run", "said"),
    [
        ({"task_type": "SEQ_CLS"}, "CAUSAL_LM", "Its task differs from the run's.*--task seq_cls"),
        ({}, "CAUSAL_LM", "has no such module, the adapter is of another task or model"),
        ({"task_type": "CAUSAL_LM"}, "SEQ_CLS", "Name that module in --modules_to_save"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS", "Name that module in --modules_to_save"),
    ],
)
def test_an_adapter_of_a_classifier_in_a_run_of_another_task_says_so(
    tmp_path: Path, config: dict[str, str], run: str, said: str
) -> None:
    folder = adapter(tmp_path, score=torch.ones(2, 4), **config)
    with pytest.raises(UserError, match=said) as caught:
        read_peft(folder, SHAPES, rank=2, alpha=4, task_type=run)
    assert "score.weight" in str(caught.value)
    assert ("modules_to_save" in str(caught.value)) == ("task differs" not in said)
    with_head = SHAPES | {"score.weight": (2, 4)}
    assert "score.weight" in read_peft(folder, with_head, rank=2, alpha=4, task_type="SEQ_CLS")
