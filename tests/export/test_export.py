"""The adapter in PEFT's format: what PEFT makes of it, and going on from it."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.reference import whole_model
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import in_full

TRAIN, REFUSAL = "tests.work.run:train", "tests.work.run:refusal"
ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOKENS_MT = torch.arange(2 * 24).view(2, 24) * 5 % 250


@torch.no_grad()
def peft_logits(tiny: TinyRun, adapter: Path) -> Tensor:
    with warnings.catch_warnings():
        # What PEFT says of keys that are missing or left over; that it is behind transformers is
        # between the two.
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        base = whole_model(tiny.model, quantization="nf4")
        model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    return model(input_ids=TOKENS_MT).logits


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({}, ALL_LINEAR),
        ({"modules_to_save": "lm_head"}, ALL_LINEAR),
        ({"modules_to_save": "embed_tokens,norm", "rank": 2, "alpha": 3.0}, ALL_LINEAR),
        ({"target_modules": "q_proj,down_proj"}, {"q_proj", "down_proj"}),
        ({"target_modules": r".*layers\.1\..*(k|up)_proj"}, {"k_proj", "up_proj"}),
    ],
    ids=["plain", "head", "embeddings-and-norm", "names", "regex"],
)
def test_peft_computes_the_logits_of_the_trained_engine(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, options: dict[str, object], adapted: set[str]
) -> None:
    flags = tiny.flags(tmp_path, dropout=0.1, **options)
    ours, others = ranks(2, "tests.work.run:trained_logits", flags=flags, input_ids_MT=TOKENS_MT)
    assert torch.equal(ours, others)
    theirs = peft_logits(tiny, tmp_path / "adapter")
    assert theirs.numpy() == pytest.approx(ours.numpy(), abs=2e-5)

    base = whole_model(tiny.model, quantization="nf4")
    with torch.no_grad():
        untrained = base(input_ids=TOKENS_MT).logits
    assert (ours - untrained).abs().max() > 0.1, "training moved the logits"

    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in weights if "lora_" in key} == adapted
    if "regex" in str(options) or "layers" in str(options.get("target_modules")):
        assert all(".layers.1." in key for key in weights)
    saved = {key.split(".")[-2] for key in weights if "lora_" not in key}
    wanted = options.get("modules_to_save")
    assert saved == (set(str(wanted).split(",")) if wanted else set())


@pytest.mark.parametrize(
    "options",
    [
        # In make test the exported folders of test_export_program.py have every method.
        in_full({"method": "roselora"}),
        in_full({"method": "sora"}),
        {"method": "sora", "sora_reopen": False, "sora_lambdas": (0.5, 2.0)},
        in_full({"method": "increlora"}),
        {"method": "increlora", "increlora_preset": "released", "increlora_every": 2},
        in_full({"method": "adalora", "adalora_target_rank": 1.0}),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_peft_computes_the_logits_of_every_method(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, options: dict[str, object]
) -> None:
    flags = tiny.flags(tmp_path, max_steps=10, **options)
    ours, others = ranks(2, "tests.work.run:trained_logits", flags=flags, input_ids_MT=TOKENS_MT)
    assert torch.equal(ours, others)
    theirs = peft_logits(tiny, tmp_path / "adapter")
    assert theirs.numpy() == pytest.approx(ours.numpy(), abs=5e-5)
    with torch.no_grad():
        untrained = whole_model(tiny.model, quantization="nf4")(input_ids=TOKENS_MT).logits
    assert (ours - untrained).abs().max() > 1e-3, "training moved the logits"


def test_a_module_trained_in_full_trains_and_counts(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    ranks(2, TRAIN, flags=tiny.flags(tmp_path, modules_to_save="lm_head"))
    base = whole_model(tiny.model, quantization="none").lm_head.weight.data
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (head,) = (w for key, w in weights.items() if "lm_head" in key)
    assert head.shape == base.shape
    assert ((head - base).abs() > 1e-3).float().mean() > 0.5
    adapters = sum(w.numel() for key, w in weights.items() if "lora_" in key)
    assert read_records(tmp_path / "metrics.jsonl")[1]["live_entries"] == adapters + base.numel()


def test_the_config_names_base_rank_and_alpha(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    ranks(1, TRAIN, flags=tiny.flags(tmp_path, max_steps=1, rank=2, alpha=5.0, dropout=0.25))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny.model)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 5.0, 0.25)
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert len(config["target_modules"]) == 14


@pytest.fixture(scope="module")
def adapter(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an adapter of rank 4 with a head trained in full."""
    folder = tmp_path_factory.mktemp("first")
    ranks(2, TRAIN, flags=tiny.flags(folder, modules_to_save="lm_head"))
    return folder


def test_training_goes_on_from_an_exported_adapter(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, adapter: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(adapter / "adapter", first)
    options = {"init_adapter": first, "modules_to_save": "lm_head"}
    flags = tiny.flags(tmp_path / "run", **options)
    ranks(2, TRAIN, flags=[*flags, "--stop_after", "2"])
    first.rename(tmp_path / "gone")  # modelscope/ms-swift#3396: the checkpoint has all of it
    ranks(2, TRAIN, flags=[*flags, "--resume", "auto"])
    last, rows = (
        read_records(adapter / "metrics.jsonl")[-1],
        read_records(tmp_path / "run" / "metrics.jsonl"),
    )
    assert rows[0]["held_out_loss"] == pytest.approx(last["held_out_loss"], abs=1e-6)
    assert rows[-1]["loss"] < rows[1]["loss"]


def test_peft_goes_on_from_ours_and_we_from_pefts(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """PEFT writes the adapter, with its own keys; our first held-out logits are PEFT's."""
    base = whole_model(tiny.model, quantization="nf4")
    settings = peft.LoraConfig(r=4, lora_alpha=32.0, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(str(tmp_path / "theirs"))
    flags = tiny.flags(
        tmp_path / "ours",
        init_adapter=tmp_path / "theirs",
        target_modules="q_proj,down_proj",
        max_steps=1,
        learning_rate=1e-12,
    )
    ours, _ = ranks(2, "tests.work.run:trained_logits", flags=flags, input_ids_MT=TOKENS_MT)
    with torch.no_grad():
        theirs = model.eval()(input_ids=TOKENS_MT).logits
    assert ours.numpy() == pytest.approx(theirs.numpy(), abs=2e-5)


def damaged(adapter: Path, folder: Path, **config: object) -> Path:
    folder.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 8}, "Its rank is 4, but --rank is 8"),
        ({"alpha": 8.0}, "Its alpha is 32.0, but --alpha is 8.0"),
        ({"target_modules": "q_proj"}, "and --target_modules differ in 12"),
        ({"modules_to_save": "[]"}, "lm_head"),
    ],
    ids=["rank", "alpha", "targets", "modules"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    ranks: Ranks,
    tiny: TinyRun,
    tmp_path: Path,
    adapter: Path,
    options: dict[str, object],
    said: str,
) -> None:
    given = {"init_adapter": adapter / "adapter", "modules_to_save": "lm_head"} | options
    messages = ranks(2, REFUSAL, flags=tiny.flags(tmp_path, **given))
    assert all(said in message for message in messages)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"use_of_next_year": True},
    ],
    ids=str,
)
def test_another_kind_of_adapter_is_refused(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, adapter: Path, config: dict[str, object]
) -> None:
    other = damaged(adapter / "adapter", tmp_path / "other", **config)
    flags = tiny.flags(tmp_path / "run", init_adapter=other, modules_to_save="lm_head")
    for message in ranks(2, REFUSAL, flags=flags):
        assert "not a plain LoRA" in message or "different ranks" in message
    assert ("PEFT does not know" in message) == ("use_of_next_year" in config)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "a._checkpoint_wrapped_module."])
def test_an_adapter_of_a_wrapped_model_is_named(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, adapter: Path, wrapper: str
) -> None:
    other = damaged(adapter / "adapter", tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    prefix = "base_model.model."
    named = {f"{prefix}{wrapper}{k.removeprefix(prefix)}": w for k, w in weights.items()}
    save_file(named, other / "adapter_model.safetensors", metadata={"format": "pt"})
    flags = tiny.flags(tmp_path / "run", init_adapter=other, modules_to_save="lm_head")
    for message in ranks(2, REFUSAL, flags=flags):
        assert "was saved from a wrapped model" in message


def test_an_adapter_of_a_wider_model_is_refused(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, adapter: Path
) -> None:
    other = damaged(adapter / "adapter", tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    wider = {k: torch.cat([w, w], dim=1) if "lora_A" in k else w for k, w in weights.items()}
    save_file(wider, other / "adapter_model.safetensors", metadata={"format": "pt"})
    flags = tiny.flags(tmp_path / "run", init_adapter=other, modules_to_save="lm_head")
    for message in ranks(2, REFUSAL, flags=flags):
        assert "shape" in message and "lora_a" in message.lower()
