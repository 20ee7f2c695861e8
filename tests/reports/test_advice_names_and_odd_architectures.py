"""Advice that helps only some linears, names that look like numbers, classifiers that read padding,
and architectures whose code or configuration is unusual."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    ByT5Tokenizer,
    CodeGenConfig,
    LongformerConfig,
    LongformerModel,
    PretrainedConfig,
    RecurrentGemmaConfig,
)

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.config.yaml_file import parse_yaml, yaml_of
from sparse_lora_dist.data.fingerprint import hash_of_tokenizer
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import RunContext
from sparse_lora_dist.model.look import inputs_of, look_at
from sparse_lora_dist.plan.forecast import forecast
from sparse_lora_dist.plan.playback.llama_sizes import as_llama
from sparse_lora_dist.show.table import Module, table
from sparse_lora_dist.training.feed import open_tokenizer, settle_padding
from sparse_lora_dist.training.fits import check_rope
from tests.conftest import Ranks
from tests.fixtures.tiny_classifier import framing_tokenizer, write_labelled
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import byte_tokenizer
from tests.plan.test_plan import outcome

TRIED = "tests.work.folders:tried"


def context(*shapes: tuple[int, int], rank: int = 8, steps: int = 100) -> RunContext:
    sites = tuple(
        Site(name=f"m.{i}", in_features=n, out_features=m, rank=rank)
        for i, (m, n) in enumerate(shapes)
    )
    return RunContext(total_steps=steps, warmup_steps=0, learning_rate=1e-3, sites=sites)


def built(method: str, plan: RunContext, **options: Any) -> Any:
    factory = METHODS[method]
    return factory.build(factory.options(**options), plan)


@pytest.mark.parametrize("total", ["increlora_budget", "increlora_modules"])
def test_the_budget_of_a_model_is_planned_as_its_share_of_each_linear(total: str) -> None:
    """28 linears of rank 16 at 3.5 components, or 12 linears that grow at a time."""
    plan, increlora = context(*[(64, 64)] * 28, rank=16), METHODS["increlora"]
    given = {"increlora_budget": 98, "increlora_modules": 14}[total]
    found = forecast(increlora, increlora.options(**{total: given}), plan).on(1)
    alike = {"increlora_target_rank": 3.5} if total == "increlora_budget" else {}
    wanted = forecast(increlora, increlora.options(**alike), plan).on(1)
    assert found.last == pytest.approx(wanted.last, abs=0.01) and found.peak < 0.6


@pytest.mark.parametrize("sizes", [(192, 192), (4096, 4096), (64, 96), (7, 1000)])
def test_the_density_that_shira_advises_is_taken(sizes: tuple[int, int]) -> None:
    plan, options = context((512, 512), sizes), {"shira_support": "rows"}
    with pytest.raises(ValueError, match="Take --shira_density") as caught:
        built("shira", plan, shira_density=1e-6, **options)
    advised = float(str(caught.value).split("--shira_density ")[-1].split()[0])
    built("shira", plan, shira_density=advised, **options)
    with pytest.raises(ValueError, match="Take --shira_density"):
        built("shira", plan, shira_density=0.9 * advised, **options)


@pytest.mark.parametrize("method", ["shira", "sara"])
def test_the_rank_that_is_advised_fits_all_linears(method: str) -> None:
    shapes = ((64, 64), (16, 64), (48, 48))
    with pytest.raises(ValueError, match="Take --rank") as caught:
        built(method, context(*shapes, rank=64))
    advised = int(str(caught.value).split("Take --rank ")[1].split()[0])
    built(method, context(*shapes, rank=advised))


def test_growth_that_cannot_come_sooner_is_told_what_is_left() -> None:
    with pytest.raises(ValueError, match="Lower --increlora_every, or raise --max_steps"):
        built("increlora", context((64, 64), steps=20), increlora_every=20)
    options = {"increlora_begin": 0.99, "increlora_end": 1.0, "increlora_every": 1}
    with pytest.raises(ValueError, match="lower --increlora_begin, or raise --max_steps"):
        built("increlora", context((64, 64), steps=20), **options, increlora_modules=1)


@given(st.text() | st.from_regex(r"[-+]?[0-9._exEX]{1,8}", fullmatch=True))
def test_a_text_in_a_written_file_of_options_is_read_as_that_text(text: str) -> None:
    """08, 1e5, 0x1F and 12e3456 are no numbers in YAML 1.1, and numbers here."""
    printable = "".join(c for c in text if c.isprintable())
    options = {"output_dir": printable, "column_names": [printable]}
    assert parse_yaml(yaml_of(options)) == options


def test_a_moved_run_goes_back_to_one_of_its_checkpoints_where_it_is(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    ranks(1, TRIED, flags=tiny.flags(tmp_path / "a", max_steps=3, stop_after=2, save_every=1))
    (tmp_path / "a").rename(tmp_path / "b")
    first = tmp_path / "b" / "checkpoints" / "step_00000001"
    flags = ["--config", str(tmp_path / "b" / "run.yaml"), "--resume", str(first)]
    (said,) = ranks(1, TRIED, flags=[*flags, "--stop_after", "null"])
    assert f"the run of {tmp_path}/a was moved, and goes on in {tmp_path}/b" in said
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


# Tokenizers


def test_a_tokenizer_that_cuts_and_pads_is_the_same_before_and_after_its_first_call(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 4
    config: Any = SimpleNamespace(model=SimpleNamespace(trust_remote_code=False))
    model: Any = SimpleNamespace(folder=tmp_path)
    opened = open_tokenizer(config, model)
    before = hash_of_tokenizer(opened)
    assert len(opened("a longer text")["input_ids"]) == len("a longer text")
    assert hash_of_tokenizer(opened) == before == hash_of_tokenizer(byte_tokenizer())


@pytest.mark.parametrize("setting", ["truncation_side", "split_special_tokens"])
def test_settings_beside_the_tokenizers_file_make_another_tokenizer(setting: str) -> None:
    """Otherwise rows of one would be taken from the cache of the other."""
    tokenizer, usual = byte_tokenizer(), hash_of_tokenizer(byte_tokenizer())
    setattr(tokenizer, setting, "left" if setting == "truncation_side" else True)
    assert hash_of_tokenizer(tokenizer) != usual


def test_a_tokenizer_written_in_python_is_named(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    config: Any = SimpleNamespace(model=SimpleNamespace(trust_remote_code=False))
    model: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match="a ByT5Tokenizer, which is written in Python"):
        open_tokenizer(config, model)


# Architectures

SMALL = {"vocab_size": 99, "num_labels": 3}
LIKE_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSIFIERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "xlnet": (True, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "convbert": (True, LIKE_BERT | {"intermediate_size": 64, "embedding_size": 32}),
    "bert": (False, LIKE_BERT | {"intermediate_size": 64}),
    "llama": (False, LIKE_BERT | {"intermediate_size": 64}),
    "gpt2": (False, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bart": (
        False,
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_that_reads_padding_is_found(kind: str) -> None:
    """XLNet answers at the last token of the row; ConvBERT's convolutions reach into padding."""
    reads, sizes = CLASSIFIERS[kind]
    config = AutoConfig.for_model(kind, **SMALL, **sizes)
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    model = meta_model(config, task="seq_cls", dtype=torch.float32, **options)
    assert look_at(model, "seq_cls").reads_padding == reads


def test_a_linear_whose_output_the_model_changes_in_place_is_adapted(
    ranks: Ranks, tmp_path: Path
) -> None:
    tokenizer = framing_tokenizer()
    sizes = LIKE_BERT | {"intermediate_size": 64, "attention_window": 8, "pad_token_id": 0}
    config = LongformerConfig(vocab_size=len(tokenizer), max_position_embeddings=80, **sizes)
    LongformerModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    run = write_labelled(tmp_path / "data", tmp_path / "model")
    flags = run.flags(tmp_path / "run", task="seq_cls", max_steps=1, quantization="none")
    (said,) = ranks(1, TRIED, flags=flags)
    assert "trained   1 of 1 steps" in said


@pytest.mark.parametrize(
    "config",
    [
        CodeGenConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        RecurrentGemmaConfig(vocab_size=99, num_hidden_layers=3, **{"hidden_size": 32}),
    ],
    ids=["without pad_token_id", "without max_position_embeddings"],
)
def test_a_configuration_without_a_usual_field_is_read(config: PretrainedConfig) -> None:
    module = torch.nn.Module()
    embedding = torch.nn.Embedding(99, 4)
    module.config, module.get_input_embeddings = config, lambda: embedding  # type: ignore[assignment]
    model: Any = SimpleNamespace(module=module, as_before=False)
    pad = settle_padding(model, byte_tokenizer())
    assert 0 <= pad < 99 and config.pad_token_id == pad
    check_rope(model, 4096, "--data", alone=False, change="")
    assert inputs_of(module, "seq_cls")["input_ids"].shape == (2, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "sizes", "width"),
    [
        ("opt", {"hidden_size": 32, "ffn_dim": 72}, 72),
        ("bloom", {"hidden_size": 32}, 128),
        ("gpt2", {"n_embd": 32, "n_inner": 40}, 40),
    ],
)
def test_widths_with_other_names_are_planned(kind: str, sizes: dict[str, int], width: int) -> None:
    config = AutoConfig.for_model(kind, num_attention_heads=4, **sizes)
    assert as_llama(config, "it cannot run").intermediate_size == width
    with pytest.raises(UserError, match="to a copy of config.json in another folder"):
        as_llama({"hidden_size": 32}, "it cannot run")


def test_twice_the_ranks_are_on_twice_the_nodes() -> None:
    found = outcome(world_size=2, nodes=1, gpu_memory="1GB")
    assert "4 ranks on 2 nodes" in [change.what for change in found.changes]


def test_no_total_is_shown_where_no_norm_is_known() -> None:
    modules = [Module(name="m", entries=4, alive=4, bytes=8)] * 2
    *_, unknown = table(modules).splitlines()
    assert unknown.split()[:2] == ["2", "modules"] and unknown.split()[-1] == "MB"


def test_an_adapter_is_no_start_for_what_is_drawn_around_its_tensors(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """lora_mini's tensors have LoRA's names, and its shapes where a linear has lora_mini_size."""
    options = {"target_modules": "q_proj", "max_steps": 1}
    ranks(1, TRIED, flags=tiny.flags(tmp_path / "a", **options))
    options |= {"method": "lora_mini", "init_adapter": tmp_path / "a" / "adapter"}
    (said,) = ranks(1, TRIED, flags=tiny.flags(tmp_path / "b", **options))
    assert "--init_adapter gives the tensors A and B of LoRA, but --method lora_mini" in said
