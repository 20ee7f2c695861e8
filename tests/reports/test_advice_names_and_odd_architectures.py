"""Advice that helps only some linears, names that look like numbers, classifiers that read padding,
and architectures whose code or configuration is unusual."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    BertConfig,
    ByT5Tokenizer,
    CodeGenConfig,
    LongformerConfig,
    LongformerModel,
    PretrainedConfig,
    RecurrentGemmaConfig,
    T5Config,
    T5Model,
)

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.config.yaml_file import TextLoader, parse_yaml, read_entries, yaml_of
from sparse_lora_dist.data.fingerprint import hash_of_tokenizer
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import RunContext
from sparse_lora_dist.model.look import inputs_of, look_at, refuse_seeing_ahead, settle_padded_rows
from sparse_lora_dist.plan.forecast import forecast
from sparse_lora_dist.plan.playback.llama_sizes import as_llama
from sparse_lora_dist.show.table import Module, table
from sparse_lora_dist.system.shipped import CONFIG, ENGINE
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.training.feed import open_tokenizer, settle_padding
from sparse_lora_dist.training.fits import check_rope
from tests.conftest import Ranks
from tests.export.test_export_program import exported
from tests.fixtures.data_files import jsonl
from tests.fixtures.tiny_classifier import framing_tokenizer, write_labelled
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import byte_tokenizer
from tests.plan.test_plan import outcome

read_labelled = TASKS["seq_cls"].read
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


@pytest.mark.parametrize("gives", [True, False])
def test_pairs_have_the_segments_that_the_tokenizer_gives(tmp_path: Path, gives: bool) -> None:
    """Those of transformers 5 for ALBERT give none, which is what users of the classifier see."""
    tokenizer = framing_tokenizer()
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * gives
    tokenizer.model_input_names = names
    rows = [{"text": "a", "other": "b", "label": label} for label in (0, 1)]
    config: Any = BertConfig(num_labels=2, id2label={0: "0", 1: "1"})
    (document, _) = read_labelled(
        str(jsonl(tmp_path / "a.jsonl", rows)),
        tokenizer,
        config,
        DataConfig(text_pair_field="other", label_field="label"),
        column_names=(),
        sequence_length=32,
        max_samples=None,
    )
    wanted = tokenizer("a", "b").get("token_type_ids", [])
    assert document.segment_ids.tolist() == wanted and bool(wanted) == gives


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
CLASSIFIERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "xlnet": (True, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "fnet": (True, LIKE_BERT | {"intermediate_size": 64}),
    "convbert": ("said", LIKE_BERT | {"intermediate_size": 64, "embedding_size": 32}),
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
    """XLNet answers at the last token of the row, FNet has no mask; ConvBERT's convolutions reach
    into padding."""
    reads, sizes = CLASSIFIERS[kind]
    config = AutoConfig.for_model(kind, **SMALL, **sizes)
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    model = meta_model(config, task="seq_cls", dtype=torch.float32, **options)
    look = look_at(model, "seq_cls")
    if reads is True:
        with pytest.raises(UserError, match="by as much as on the text"):
            settle_padded_rows(model, look)
    else:
        assert bool(settle_padded_rows(model, look)) == bool(reads)


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


CAUSAL: dict[str, tuple[bool, dict[str, Any]]] = {
    "gemma3_text": (True, LIKE_BERT | {"head_dim": 8, "use_bidirectional_attention": True}),
    "bert-generation": (True, LIKE_BERT | {"intermediate_size": 64}),
    "xlnet": CLASSIFIERS["xlnet"],
    "gemma3": (False, {}),
    "mamba": (False, {"hidden_size": 32, "num_hidden_layers": 2}),
    "gpt2": CLASSIFIERS["gpt2"],
    "bart": CLASSIFIERS["bart"],
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_model_whose_tokens_see_those_after_them_is_no_causal_one(kind: str) -> None:
    sees, sizes = CAUSAL[kind]
    kind = "gemma3_text" if kind == "gemma3" else kind
    config = AutoConfig.for_model(kind, vocab_size=99, **(sizes or LIKE_BERT | {"head_dim": 8}))
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    model = meta_model(config, task="causal_lm", dtype=torch.float32, **options)
    look = look_at(model, "causal_lm")
    assert look.sees_ahead == sees
    with pytest.raises(UserError, match="sees those after it") if sees else nullcontext():
        refuse_seeing_ahead(model, look)


@pytest.mark.usefixtures("model_on_disk")
def test_a_merge_keeps_whole_what_the_run_kept_whole(ranks: Ranks, tmp_path: Path) -> None:
    """T5 reads a weight to see its dtype: those are not quantised in the run."""
    tokenizer = framing_tokenizer()
    sizes = {"d_model": 64, "d_ff": 64, "num_layers": 2, "d_kv": 16, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), **sizes, decoder_start_token_id=0)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    T5Model(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    run = write_labelled(tmp_path / "data", tmp_path / "model")
    flags = run.flags(tmp_path / "run", task="seq_cls", max_steps=1, target_modules="q")
    (said,) = ranks(1, TRIED, flags=flags)
    assert "trained   1 of 1 steps" in said
    exported(tmp_path / "run", tmp_path / "merged", "--format", "merged", "--dtype", "fp32")
    before, after = (
        {k: t for f in (tmp_path / name).glob("*.safetensors") for k, t in load_file(f).items()}
        for name in ("model", "merged")
    )
    kept = [name for name in before if name.endswith(".wo.weight")]
    found = {name: next(n for n in after if n.endswith(name)) for name in kept}
    assert kept and all(torch.equal(before[n], after[found[n]].float()) for n in kept)


def test_a_folder_of_a_name_that_is_shipped_does_not_hide_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in the folder zero3 could not be resumed."""
    monkeypatch.chdir(tmp_path)
    for name in ("zero3", "demo", "mine"):
        (tmp_path / name).mkdir()
    assert ENGINE.find("zero3").endswith("ds_configs/zero3.json")
    assert CONFIG.find("demo").endswith("configs/demo.yaml") and CONFIG.find("mine") == "mine"


def test_words_for_null_in_a_sweep_are_null(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("base_cache: ~\neval_data:\nrevision: '~'\nrank: [8, ~]\n")
    entries = {e.name: e.value for e in read_entries(str(file), place="", loader=TextLoader)}
    assert entries == {
        "base_cache": "null",
        "eval_data": "null",
        "revision": "~",
        "rank": ["8", "null"],
    }


def test_growth_that_has_nothing_to_open_is_said() -> None:
    plan = context((64, 64), rank=8)
    (note,) = built("increlora", plan, increlora_start_rank=6).notes
    assert "no linear grows: all begin with 6 components" in note
    assert built("increlora", plan, increlora_start_rank=2).notes == ()


def test_a_checkpoint_that_is_a_link_to_another_disk_belongs_to_its_run(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    run, saved = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000002"
    ranks(1, TRIED, flags=tiny.flags(run, max_steps=4, stop_after=2))
    saved.rename(tmp_path / "elsewhere")
    saved.symlink_to(tmp_path / "elsewhere")
    for resume, stop in (("auto", 3), (str(saved), "null")):
        flags = ["--config", str(run / "run.yaml"), "--resume", resume, "--stop_after", str(stop)]
        (said,) = ranks(1, TRIED, flags=flags)
        assert f"{saved}, step 2" in said and saved.is_symlink()


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
