"""Rows that only fill a batch up, tokenizers that draw, linears that are one weight, files that an
editor saved, and programs that use the package from Python."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    PreTrainedTokenizerFast,
)

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sections import AdapterConfig, ModelConfig
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.model.base_files import refuse_tied_linears
from sparse_lora_dist.model.look import look_at
from sparse_lora_dist.model.targets import find_full, find_sites
from sparse_lora_dist.plan import plan_options
from sparse_lora_dist.report.jsonl import read_lines
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.system.own_files import Marker, read_marker, write_marker
from sparse_lora_dist.tasks.class_head import Head
from sparse_lora_dist.training.feed import open_tokenizer
from tests.conftest import Ranks
from tests.fixtures.data_files import jsonl, learned, load
from tests.fixtures.tiny_classifier import framing_tokenizer, write_labelled
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import MARKED, byte_tokenizer

TRIED = "tests.work.folders:tried"


@pytest.mark.usefixtures("model_on_disk")
def test_a_classifier_that_answers_at_the_end_token_gets_batches_that_are_filled_up(
    ranks: Ranks, tmp_path: Path
) -> None:
    """42 rows in steps of 4, 11 held-out rows in batches of 4: BART wants as many end tokens in
    each row."""
    tokenizer = framing_tokenizer()
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 80}
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    config = BartConfig(vocab_size=len(tokenizer), **layers, **heads, **widths, **ids, num_labels=3)
    BartForSequenceClassification(config).model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    run = write_labelled(tmp_path / "data", tmp_path / "model")
    options: dict[str, Any] = {"task": "seq_cls", "micro_batch_size": 4, "quantization": "none"}
    flags = run.flags(tmp_path / "run", **options, max_steps="null", num_epochs=0.25)
    (said,) = ranks(1, TRIED, flags=[*flags, "--eval_batches", "9"])
    assert "trained   3 of 3 steps" in said, said
    with run.data.open("a") as file:
        file.write('{"text": "it </s> was", "label": "good"}\n')
    (said,) = ranks(1, TRIED, flags=[*flags, "--output_dir", str(tmp_path / "other")])
    assert "train.jsonl:43: This example has 2 tokens '</s>'" in said, said


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path: Path) -> None:
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.5))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    config: Any = SimpleNamespace(model=SimpleNamespace(trust_remote_code=False))
    model: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match="draws tokens at random"):
        open_tokenizer(config, model)


def test_special_tokens_that_are_split_are_found_between_marks(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=MARKED)
    tokenizer.split_special_tokens = True
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    documents = load(jsonl(tmp_path / "a.jsonl", [{"messages": chat}]), tokenizer)
    assert learned(documents, tokenizer) == ["b<|end|>"]
    assert int((documents[0].labels != -100).sum()) == len("b<|end|>")


def test_linears_that_are_one_weight_are_refused_in_4_bits() -> None:
    """Zamba2's blocks."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.config = SimpleNamespace(model_type="zamba2")
    refuse_tied_linears(ModelConfig(), model)
    model[2].weight = model[0].weight
    with pytest.raises(UserError, match=r"0\.weight and 2\.weight are one weight"):
        refuse_tied_linears(ModelConfig(), model)
    refuse_tied_linears(ModelConfig(quantization="none"), model)


def test_a_module_without_parameters_is_nothing_to_train(tiny: TinyRun) -> None:
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny.model))
    with pytest.raises(UserError, match=r"model\.rotary_emb holds no parameters"):
        find_full(model, ["model.rotary_emb"], Head())
    with pytest.raises(UserError, match=r"--target_modules .q_proj\\r."):
        find_sites(model, AdapterConfig(target_modules="q_proj\r"), ())


def test_a_head_whose_weight_is_asked_for_is_found() -> None:
    """Mamba asks for its dtype, which a linear with an adapter does not answer."""
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    for kind, asked in (("mamba", True), ("gpt2", False)):
        sizes = (
            {"hidden_size": 32, "num_hidden_layers": 2} if asked else {"n_embd": 32, "n_head": 4}
        )
        config = AutoConfig.for_model(kind, vocab_size=99, **sizes)
        model = meta_model(config, task="causal_lm", dtype=torch.float32, **options)
        assert ("lm_head" in look_at(model, "causal_lm").read) == asked


@pytest.mark.parametrize("size", ["24000000000", "2000TB"])
def test_a_size_without_its_unit_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="A number alone is GB"):
        plan_options.load_request(["--gpu_memory", size])


def test_files_that_an_editor_saved_with_a_mark_of_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"step": 1}\n{"step": 2}\n')
    assert [record["step"] for record in read_records(file)] == [1, 2]
    assert [record["step"] for record in read_lines(file, lambda record: True)] == [1, 2]
    write_marker(tmp_path, Marker(kind="run"))
    marker = tmp_path / ".sparse_lora_dist.json"
    marker.write_bytes(b"\xef\xbb\xbf" + marker.read_bytes())
    found = read_marker(tmp_path)
    assert found is not None and found.kind == "run"


def test_a_base_cache_in_the_folder_of_a_new_run_is_refused(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path / "x"), "--base_cache", str(tmp_path / "x" / "cache")]
    with pytest.raises(ConfigError, match="which must be empty when a run begins"):
        load_config(flags)
    assert not (tmp_path / "x").exists()
    flags[-1] = str(tmp_path / "cache")
    assert load_config(flags).model.base_cache == str(tmp_path / "cache")


@pytest.mark.usefixtures("processes")
def test_training_may_be_used_twice_and_takes_the_next_step_only(
    tiny: TinyRun, tmp_path: Path
) -> None:
    """The package ``training`` hid the function of this name."""
    flags = {name: str(getattr(tiny, name)) for name in ("model", "data")}
    program = f"""
import sparse_lora_dist as sld
from sparse_lora_dist.errors import UserError
import sparse_lora_dist.training.job as job
for name in ("a", "b"):
    options = dict({flags}, output_dir="{tmp_path}/" + name, max_steps=2, trackers=[], rank=4)
    with sld.training(sld.settings(**options, sequence_length=64)) as now:
        for wrong in (0, 2):
            try:
                now.step(wrong)
            except UserError as error:
                print(error)
        print([now.step(step).tokens > 0 for step in now.steps])
assert job.Job and sld.run
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("[True, True]") == 2
    assert done.stdout.count("step(2) is not the next step: [1]") == 2
