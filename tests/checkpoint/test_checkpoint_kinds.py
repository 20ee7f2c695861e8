"""LOAD: checkpoints that came quantised, and mixtures of experts, on 1 to 4 ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparse_lora_dist.base_model.architecture import meta_model, read_config
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_models import save_family
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import grid
from tests.work.kinds import quantize_folder

TRAIN = "tests.work.run:train"
ROOM = {"vocab_size": 300, "max_position_embeddings": 256}


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


@grid("kind size", list(KINDS), [2, 1, 3, 4])
def test_what_came_quantised_is_taken_as_it_is(
    ranks: Ranks, quantized: dict[str, Path], kind: str, size: int
) -> None:
    folder = str(quantized[kind])
    for rank in ranks(size, "tests.work.kinds:packed_like_the_files", folder=folder):
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
        "tests.work.kinds:experts_like_transformers",
        folder=str(folder),
        plain=str(tmp_path / "plain"),
    )
    layers = 2
    assert [rank["experts"] for rank in everyone] == [layers] * size
    # Gate, up and down of each expert; query, key, value and output of each layer.
    assert [rank["matrices"] for rank in everyone] == [layers * (3 * experts + 4)] * size


UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], None]


def _drop(ending: str) -> Change:
    return lambda tensors: tensors.__delitem__(UP + ending)


def _put(ending: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({UP + ending: value(tensors[UP + ending])})


SPOILT: dict[str, tuple[Change, list[str]]] = {
    "no scales": (_drop(".absmax"), ["up_proj", ".absmax is missing"]),
    "no scales of scales": (_drop(".nested_absmax"), ["up_proj", ".nested_absmax is missing"]),
    "another code": (
        _put(".quant_map", lambda t: t + 0.1),
        ["up_proj", "code tables", "NF4 and FP4"],
    ),
    "a code of another length": (_put(".quant_map", lambda t: t[:15]), ["up_proj", "code tables"]),
    "a code in another dtype": (_put(".quant_map", lambda t: t.half()), ["up_proj", "code tables"]),
    "too few bytes": (_put("", lambda t: t[:-3]), ["up_proj", "packed bytes", "Download"]),
    "a state that is no JSON": (
        _put(".quant_state.bitsandbytes__nf4", lambda t: t[1:]),
        ["up_proj", "valid quantisation state", "Download"],
    ),
    "a state without a shape": (
        _put(
            ".quant_state.bitsandbytes__nf4",
            lambda t: torch.tensor(list(bytes(t.numpy()).replace(b'"shape"', b'"other"'))).byte(),
        ),
        ["up_proj", "valid quantisation state", "Download"],
    ),
    "no state": (_drop(".quant_state.bitsandbytes__nf4"), ["up_proj", "[37, 60]"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_quantised_checkpoint_is_refused(
    ranks: Ranks, quantized: dict[str, Path], tmp_path: Path, case: str
) -> None:
    change, words = SPOILT[case]
    shutil.copytree(quantized["nf4"], tmp_path / "spoilt")
    file = tmp_path / "spoilt" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    for said in ranks(2, "tests.work.kinds:opening_error_of", folder=str(file.parent)):
        assert all(word in said for word in [str(file), *words]), said


def test_what_is_in_4_bits_cannot_be_had_otherwise(
    ranks: Ranks, quantized: dict[str, Path]
) -> None:
    folder = str(quantized["nf4"])
    wanted = {"folder": folder, "quantization": "none"}
    for said in ranks(2, "tests.work.kinds:opening_error_of", **wanted):
        assert "already quantised to 4 bits" in said and "--quantization nf4" in said
    full = {"folder": folder, "full": "layers.1.mlp.up_proj"}
    for said in ranks(2, "tests.work.kinds:loading_error_with_full", **full):
        assert UP in said and "--modules_to_save" in said


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_records(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("kind", ["mixtral", "packed"])
def test_whole_runs_do_not_depend_on_ranks_or_checkpointing(
    ranks: Ranks, quantized: dict[str, Path], tiny: TinyRun, tmp_path: Path, kind: str
) -> None:
    whole = save_family(tmp_path / "whole", "mixtral" if kind == "mixtral" else "llama", **ROOM)
    model = tmp_path / "model" if kind == "packed" else whole
    if kind == "packed":
        quantize_folder(whole, model, block=128, quant_type="fp4", nested=True)
    for file in tiny.model.glob("*token*"):
        shutil.copy(file, model)
    shutil.copy(tiny.model / "chat_template.jinja", model)
    one, two = tmp_path / "one", tmp_path / "two"
    ranks(1, TRAIN, flags=tiny.flags(one, model=model, micro_batch_size=4))
    flags = tiny.flags(two, model=model, gradient_checkpointing="true")
    said, *_ = ranks(2, TRAIN, flags=flags)
    assert ("8 experts quantised to 4 bits one by one, no adapters" in said) == (kind == "mixtral")
    assert _losses(two) == pytest.approx(_losses(one), abs=1e-5)
    assert _losses(one)[-1] < _losses(one)[0] - 0.01


@pytest.mark.usefixtures("model_on_disk")
def test_a_router_draws_no_noise(tmp_path: Path) -> None:
    """It would be another on every rank."""
    config = read_config(save_family(tmp_path, "mixtral"), trust_remote_code=False)
    config.router_jitter_noise = 0.1
    model = meta_model(
        config,
        task="causal_lm",
        dtype=torch.float32,
        attn_implementation=None,
        trust_remote_code=False,
    )
    assert [layer.mlp.jitter_noise for layer in model.model.layers] == [0.0, 0.0]
