"""LOAD: checkpoints that came quantised, and mixtures of experts, on 1 to 4 ranks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import Ranks
from tests.kinds_work import quantize_folder
from tests.tiny_models import save_family


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that transformers and bitsandbytes quantised and saved."""
    root = tmp_path_factory.mktemp("quantized")
    whole = save_family(root / "whole", "qwen2")
    folders = {}
    for kind, double_quant, storage in (("nf4", True, "uint8"), ("fp4", False, "bfloat16")):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=storage,
        )
        model = AutoModelForCausalLM.from_pretrained(
            whole, quantization_config=config, dtype=torch.bfloat16
        )
        folders[kind] = root / kind
        model.save_pretrained(folders[kind])
    for block, kind, nested in ((128, "nf4", True), (256, "fp4", True), (512, "nf4", False)):
        name = f"{kind} in blocks of {block}"
        folders[name] = root / name
        quantize_folder(whole, folders[name], block=block, quant_type=kind, nested=nested)
    return folders


KINDS = {
    "nf4": ("nf4", 64),
    "fp4": ("fp4", 64),
    "nf4 in blocks of 128": ("nf4", 128),
    "fp4 in blocks of 256": ("fp4", 256),
    "nf4 in blocks of 512": ("nf4", 512),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_came_quantised_is_taken_as_it_is(
    ranks: Ranks, quantized: dict[str, Path], kind: str, size: int
) -> None:
    folder = str(quantized[kind])
    for rank in ranks(size, "tests.kinds_work:packed_like_the_files", folder=folder):
        assert rank["linears"] == 14
        assert rank["kinds"] == {KINDS[kind]}
        assert rank["equal"], "logits of transformers with bitsandbytes"


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("family", "experts"), [("mixtral", 4), ("qwen3_moe", 5)])
def test_experts_are_quantised_one_by_one(
    ranks: Ranks, tmp_path: Path, family: str, experts: int, size: int
) -> None:
    folder = save_family(tmp_path / family, family)
    everyone = ranks(
        size,
        "tests.kinds_work:experts_like_transformers",
        folder=str(folder),
        plain=str(tmp_path / "plain"),
    )
    layers = 2
    assert [rank["experts"] for rank in everyone] == [layers] * size
    # Gate, up and down of each expert; query, key, value and output of each layer.
    assert [rank["matrices"] for rank in everyone] == [layers * (3 * experts + 4)] * size
