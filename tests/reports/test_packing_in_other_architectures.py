"""Packed documents never see each other: in each architecture that lets them, packing is off.

Reports: huggingface/transformers#46093, modelscope/ms-swift#9618 (Qwen3.5), state-spaces/mamba#478,
mosaicml/llm-foundry#1464 (MPT).
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Llama4TextConfig, PretrainedConfig

from sparse_lora_dist import checkpoint
from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import DataConfig, ModelConfig, RunConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import Look, look_at, settle_packing
from sparse_lora_dist.training.first_look import began_before, settle
from tests.conftest import Ranks
from tests.fixtures.families import FAMILIES, SEEN, config_of
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import MARKED, byte_tokenizer
from tests.tiers import in_full

TELLING = ("llama", "gemma3_text", "qwen3_moe", "bloom", "bart", "lfm2", "mamba2", "qwen3_5_text")
"""One family of each reason, which ``make test`` takes."""
LENGTHS = (9, 11, 7)
"""Tokens of the documents of a row."""
ASKS_FOR_NINJA = "rwkv"


def looked_at(config: PretrainedConfig, task: str = "causal_lm") -> Look:
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    return look_at(meta_model(config, task=task, dtype=torch.bfloat16, **options), task)


def with_values(config: PretrainedConfig) -> Any:
    """A model of large random weights: attention that prefers nothing would hide a leak."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def moved(model: Any) -> tuple[float, float]:
    """How far logits of the first and of the later documents move when the first is changed."""
    ids = torch.randint(3, 101, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    ids[1] = ids[0]
    ids[1, : LENGTHS[0]] = (ids[0, : LENGTHS[0]] - 3 + 40) % 98 + 3
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand_as(ids)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    own, later = (logits[0] - logits[1]).abs().amax(-1).split([LENGTHS[0], sum(LENGTHS[1:])])
    return float(own.max()), float(later.max())


def test_at_least_seventy_families_are_judged() -> None:
    assert len(FAMILIES) >= 75


@pytest.mark.parametrize(
    "name", [n if n in TELLING else in_full(n) for n in FAMILIES if n != ASKS_FOR_NINJA]
)
def test_no_document_moves_another_where_documents_are_packed(name: str) -> None:
    judge(name)


def test_nor_does_one_in_a_model_that_starts_a_program(processes: None, full: None) -> None:
    judge(ASKS_FOR_NINJA)


def judge(name: str) -> None:
    own, later = moved(with_values(config_of(name)))
    assert own > 0.1
    apart = looked_at(config_of(name)).apart
    assert apart is (later <= 1e-4 * own), (own, later)
    assert apart is (name not in SEEN)


def test_nobody_who_did_not_ask_for_packing_is_refused() -> None:
    settled, notes = settle_packing(Config(), Look(apart=False), "lfm2")
    assert settled == replace(Config(), data=DataConfig(packing=False))
    assert notes == [
        "--packing is false: packed documents of a lfm2 model see each other, since its layers go "
        "on where one ends"
    ]


def test_packing_that_was_asked_for_is_refused() -> None:
    asked = Config(data=DataConfig(packing=True))
    with pytest.raises(UserError) as caught:
        settle_packing(asked, Look(apart=False), "lfm2")
    assert str(caught.value).startswith("--packing true cannot be used: packed documents of a lfm2")
    assert str(caught.value).endswith(
        "Set --packing false, which gives each document a row of its own."
    )


@pytest.mark.parametrize("apart", [True, None])
@pytest.mark.parametrize("packing", [True, False, None])
def test_a_usual_architecture_is_packed_as_was_asked(
    apart: bool | None, packing: bool | None
) -> None:
    config = Config(data=DataConfig(packing=packing))
    assert settle_packing(config, Look(apart=apart), "llama") == (config, [])


def test_a_classifier_has_a_row_for_each_example_anyway() -> None:
    config = Config(model=ModelConfig(task="seq_cls"))
    assert settle_packing(config, Look(apart=False), "bloom") == (config, [])


@pytest.mark.parametrize(("scale", "packed"), [(8, False), (8192, True)])
def test_attention_scaled_by_the_place_in_a_row_is_not_packed(scale: int, packed: bool) -> None:
    """mosaicml/llm-foundry#1793: Llama 4 scales it by the row's places, not by position_ids."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"num_hidden_layers": 4, "vocab_size": 101, "num_local_experts": 1}
    config = Llama4TextConfig(**sizes, moe_layers=[], floor_scale=scale, attn_scale=0.5)
    ids = torch.randint(3, 101, (1, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model = with_values(config)
        alone = model(input_ids=ids[:, 10:]).logits
        positions = torch.arange(10).repeat(2)[None]
        row = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 10:]
    assert torch.allclose(row, alone, atol=1e-5) == packed
    look, options = looked_at(config), Config(data=DataConfig(sequence_length=20))
    assert look.apart is True
    settled, notes = settle_packing(options, look, "llama4_text")
    assert settled.packs == packed
    assert [f"from {scale} tokens on" in note for note in notes] == ([] if packed else [True])


@pytest.fixture(scope="module")
def short_conv(
    tiny: TinyRun, model_on_disk: None, tmp_path_factory: pytest.TempPathFactory
) -> TinyRun:
    """Data of ``tiny`` and an LFM2, which has short convolutions."""
    return with_model(tiny, tmp_path_factory.mktemp("lfm2"), "lfm2")


def with_model(tiny: TinyRun, folder: Path, name: str, **options: Any) -> TinyRun:
    tokenizer = byte_tokenizer(template=MARKED)
    model = with_values(config_of(name, **{"vocab_size": len(tokenizer)} | options))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return replace(tiny, model=folder / "model")


def test_a_run_over_one_has_a_row_for_each_document_on_any_number_of_ranks(
    ranks: Ranks, short_conv: TinyRun, tmp_path: Path
) -> None:
    losses = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        options = {"max_steps": 2, "micro_batch_size": 4 // size}
        for others in ({"stop_after": 1}, {"resume": "auto"}):  # resumed as it began
            flags = short_conv.flags(folder, **options, **others)
            said = ranks(size, "tests.work.run:train", flags=flags)[0]
            assert "--packing is false: packed documents of a lfm2 model see each other" in said
            assert "40 rows of up to 64 tokens" in said
        assert yaml.safe_load((folder / "run.yaml").read_text())["packing"] is False
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if record.get("loss") is not None])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loaded_model_of_which_nothing_was_known_is_asked_before_step_1(
    ranks: Ranks, short_conv: TinyRun, tmp_path: Path
) -> None:
    for said in ranks(2, "tests.work.run:refusal_unlooked", flags=short_conv.flags(tmp_path / "r")):
        assert "packed documents of a lfm2 model see each other" in said
        assert "Set --packing false, which gives each document a row of its own." in said
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("resume", "about", "before"),
    [("auto", {}, True), ("auto", {"look": 1}, False), ("never", {}, False)],
)
def test_a_run_of_before_is_known_by_its_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resume: str,
    about: dict[str, int],
    before: bool,
) -> None:
    monkeypatch.setattr(checkpoint, "published", lambda folder: [folder / "step_00000002"])
    monkeypatch.setattr(checkpoint, "read_manifest", lambda path: {"description": about})
    run = RunConfig(output_dir=str(tmp_path), resume=resume)
    assert began_before(Config(run=run)) is before


@pytest.mark.parametrize("packing", [True, None])
def test_a_run_of_before_goes_on_packed_and_is_told(
    packing: bool | None, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = SimpleNamespace(config=SimpleNamespace(model_type="lfm2"))
    model: Any = SimpleNamespace(look=Look(apart=False), as_before=True, sites=[], module=kind)
    config = Config(data=DataConfig(packing=packing))
    assert settle(config, model) is config
    said = " ".join(capfd.readouterr().out.split())
    assert "this run goes on as it began, but packed documents of a lfm2 model see each" in said
