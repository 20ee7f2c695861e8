"""A model folder that is broken: one clear error on every rank, before a weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.errors import UserError
from tests.conftest import Ranks
from tests.fixtures.tiny_models import save_llama


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "good")


# Every row: what is done to a good folder -> words of the message. The file at fault is named.
def _no_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _truncated_in_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _five_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x01\0\0\0\0")


def _corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[20:30] = b"\xff" * 10
    file.write_bytes(raw)


def _header_is_a_list(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]" + b"\0" * 64)


def _edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edited


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(36, 60)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(37, 60, dtype=torch.int8)


def _configured(**keys: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return changed


def _indexed(index: Any) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        text = index if isinstance(index, str) else json.dumps(index)
        (folder / "model.safetensors").rename(folder / "weights.safetensors")  # else it is read
        (folder / "model.safetensors.index.json").write_text(text)

    return written


def _in_two_files(folder: Path) -> None:
    """The first tensor stands in a second file too, with another value."""
    tensors = load_file(folder / "model.safetensors")
    key = min(tensors)
    save_file({key: tensors[key] + 1}, folder / "second.safetensors")
    files = dict.fromkeys(tensors, "weights.safetensors") | {"other": "second.safetensors"}
    _indexed({"weight_map": files})(folder)


QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BAD = {
    "no folder": (_no_folder, []),
    "no config.json": (_no_config, ["config.json"]),
    "config.json is no JSON": (_config_no_json, ["config.json"]),
    "config.json without an architecture": (_configured(model_type="llamaa"), ["llamaa"]),
    "config.json says heads that do not fit": (_configured(num_attention_heads=7), []),
    "no weights": (_no_weights, ["model.safetensors", "config.json"]),
    "pickled weights": (_pickled_only, ["pytorch_model.bin", "save_pretrained"]),
    "weights cut short": (_truncated, ["model.safetensors", "cut short"]),
    "weights cut short in the header": (_truncated_in_header, ["model.safetensors", "cut short"]),
    "weights of five bytes": (_five_bytes, ["model.safetensors", "cut short"]),
    "corrupt header": (_corrupt_header, ["model.safetensors", "broken"]),
    "header is a list": (_header_is_a_list, ["model.safetensors", "broken"]),
    "tensor missing": (_edit(_drop), ["model.layers.1.mlp.up_proj.weight", "holds no tensor"]),
    "tensor of another shape": (
        _edit(_reshape),
        ["model.safetensors", "up_proj", "[36, 60]", "[37, 60]"],
    ),
    "tensor of integers": (_edit(_integers), ["model.safetensors", "up_proj", "I8", "BF16"]),
    "already quantised": (
        _configured(quantization_config=QUANTISED),
        ["already quantised", "bitsandbytes"],
    ),
    "quantised by GPTQ": (
        _configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["gptq", "original weights"],
    ),
    "quantised to 8 bits": (
        _configured(quantization_config=QUANTISED | {"load_in_4bit": False, "load_in_8bit": True}),
        ["8 bits", "original weights"],
    ),
    "experts of another family": (_configured(model_type="qwen2_moe"), ["qwen2_moe", "mixtral"]),
    "index is no JSON": (_indexed("{"), ["model.safetensors.index.json"]),
    "index is a list": (_indexed([1]), ["model.safetensors.index.json"]),
    "index has a list inside": (_indexed({"weight_map": ["a"]}), ["model.safetensors.index.json"]),
    "index names no files": (
        _indexed({"weight_map": {"a": 5}}),
        ["model.safetensors.index.json"],
    ),
    "index names a file that is not there": (
        _indexed({"weight_map": {"a": "model-00001.safetensors"}}),
        ["model.safetensors.index.json", "model-00001.safetensors"],
    ),
    "index names the folder itself": (
        _indexed({"weight_map": {"a": ""}}),
        ["model.safetensors.index.json", "does not have", "''"],
    ),
    "two files with different tensors of one name": (
        _in_two_files,
        ["weights.safetensors", "second.safetensors", "hold different tensors"],
    ),
    "one weight under two names": (
        _edit(lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] + 1})),
        ["model.norm.weight under two names", "norm.weight"],
    ),
    "index names a tensor that no file holds": (
        _indexed({"weight_map": {"ghost": "weights.safetensors"}}),
        ["model.safetensors.index.json", "ghost"],
    ),
}


def copied(good: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_one_clear_error_on_every_rank(
    ranks: Ranks, tmp_path: Path, good: Path, case: str
) -> None:
    spoil, words = BAD[case]
    folder = copied(good, tmp_path / "model")
    spoil(folder)
    for kind, message, weights_read in ranks(
        2, "tests.work.base:opening_error", folder=str(folder)
    ):
        assert kind == "UserError", message
        assert weights_read == 0 or case.startswith("two files")  # which have to be compared
        missing = [word for word in [str(folder), *words] if word not in message]
        assert not missing, f"{missing} not in: {message}"


def test_only_the_rank_that_sees_a_bad_file_needs_to_see_it(
    ranks: Ranks, tmp_path: Path, good: Path
) -> None:
    """Node-local copies of a model: one of them is cut short, and no rank waits for that one."""
    whole, bad = copied(good, tmp_path / "rank0"), copied(good, tmp_path / "rank1")
    _truncated(bad)
    (first, said, _), (second, alone, _) = ranks(
        2, "tests.work.base:opening_error_of", folders=[str(whole), str(bad)]
    )
    assert first == second == "UserError"
    assert "cut short" in alone and "rank 1" in said and "cut short" in said


def test_nodes_with_other_copies_of_a_model_are_refused(
    ranks: Ranks, tmp_path: Path, good: Path
) -> None:
    """The headers are the same, one row is not: half of each linear would be of another model."""
    other = copied(good, tmp_path / "other")
    _edit(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][-1].add_(1))(other)
    folders = [str(good), str(good), str(other)]
    for kind, message, weights_read in ranks(
        3, "tests.work.base:opening_error_of_nodes", folders=folders
    ):
        assert kind == "UserError" and weights_read == 0
        assert "rank 2 has other files" in message and "--revision" in message
    for kind, _, _ in ranks(2, "tests.work.base:opening_error_of_nodes", folders=[str(good)] * 2):
        assert kind == "none"


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_tied_tensor_that_is_there_twice_must_be_the_same(
    ranks: Ranks, tmp_path: Path, good: Path, change: float
) -> None:
    folder = copied(good, tmp_path / "tied")
    _configured(tie_word_embeddings=True)(folder)

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += change

    _edit(twice)(folder)
    everyone = ranks(2, "tests.work.base:opening_error", folder=str(folder))
    assert [kind for kind, _, _ in everyone] == ["UserError" if change else "none"] * 2
    assert all("tie_word_embeddings" in said for _, said, _ in everyone) == bool(change)


def test_a_file_that_goes_away_is_an_error_that_names_it(tmp_path: Path, good: Path) -> None:
    folder = copied(good, tmp_path / "model")
    files = CheckpointFiles(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors cannot be read any more"):
        files.whole("model.norm.weight")
