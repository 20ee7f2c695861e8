"""Classifiers whose classes are built in an unusual way, and names that are written in one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, MraConfig, MraForSequenceClassification, PreTrainedModel

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Source
from sparse_lora_dist.base_model.weight_map import find_keys, find_sources
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.data.reading import shown
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import refuse_no_embedding
from sparse_lora_dist.model.targets import Head, find_full
from sparse_lora_dist.system.own_files import Marker, write_marker
from sparse_lora_dist.training.feed import open_tokenizer
from sparse_lora_dist.training.own_folder import RUN, TRAIN, check_folder

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def classifier(config: Any) -> PreTrainedModel:
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    return meta_model(config, task="seq_cls", dtype=torch.float32, **options)


def test_a_configuration_that_says_nothing_of_tied_embeddings_ties_none() -> None:
    model = classifier(AutoConfig.for_model("markuplm", **SMALL))
    assert not hasattr(model.config, "tie_word_embeddings")
    assert list(find_full(model, ["classifier"], Head())) == ["classifier"]


def test_a_model_whose_input_embeddings_are_no_table_of_tokens_is_refused_by_name() -> None:
    sizes = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 1}
    model = classifier(AutoConfig.for_model("perceiver", **sizes, vocab_size=99))
    with pytest.raises(UserError, match="A perceiver model cannot be trained here"):
        refuse_no_embedding(model)
    refuse_no_embedding(classifier(AutoConfig.for_model("bert", **SMALL)))


@pytest.mark.usefixtures("model_on_disk")
def test_a_buffer_of_whole_numbers_is_read_from_the_files(tmp_path: Path) -> None:
    """They were refused as weights of mixed dtypes."""
    config = MraConfig(**SMALL, intermediate_size=64, max_position_embeddings=64)
    saved = MraForSequenceClassification(config)
    saved.mra.embeddings.position_ids += 3
    saved.save_pretrained(tmp_path)
    model, files = classifier(config), CheckpointFiles(tmp_path)
    name = "mra.embeddings.position_ids"
    source = find_sources(model, files, find_keys(model, files))[name]
    assert isinstance(source, Source)
    right = saved.get_buffer(name).flatten()
    assert torch.equal(files.read(source, 0, right.numel()), right)


def test_a_weight_of_whole_numbers_is_still_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", **SMALL, intermediate_size=64)
    model = classifier(config)
    whole = {n: torch.zeros(p.shape, dtype=torch.int64) for n, p in model.named_parameters()}
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    files = CheckpointFiles(tmp_path)
    with pytest.raises(UserError, match=r"has dtype I64.*one of BF16, F16, F32, or be"):
        find_sources(model, files, find_keys(model, files))


@pytest.mark.parametrize("words", ["q_proj, v_proj", " q_proj ,v_proj ", "[' q_proj', v_proj ]"])
def test_blanks_around_names_are_no_part_of_them(words: str, tmp_path: Path) -> None:
    config = load_config(["--target_modules", words, "--modules_to_save", words])
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.adapter.modules_to_save == ("q_proj", "v_proj")
    (tmp_path / "run.yaml").write_text(
        f"target_modules: {json.dumps(words)}\ntrackers: [' wandb ']\n"
    )
    read = load_config(["--config", str(tmp_path / "run.yaml")])
    assert read.adapter.target_modules == ("q_proj", "v_proj")
    assert read.run.trackers == ("wandb",)


def test_a_regular_expression_stays_one() -> None:
    for words in (r".*\.[qv]_proj", "(q_proj|v_proj)", "all-linear"):
        assert load_config(["--target_modules", words]).adapter.target_modules == words


def test_a_blank_at_the_end_of_a_name_is_seen_in_messages() -> None:
    assert shown(["assistant ", "user", ""]) == "'assistant ', user, ''"


def test_a_tokenizer_with_code_of_its_own_names_the_option(tmp_path: Path) -> None:
    content = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    model: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match=r"^The tokenizer of .*add --trust_remote_code true\.$"):
        open_tokenizer(load_config([]), model)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (".", "is not a checkpoint: it has no manifest.json. Give a step_... folder"),
        ("checkpoints", "is not a checkpoint: it has no manifest.json. Give a step_... folder"),
        ("checkpoints/set_aside_1/step_00000006", "can only begin another run. Choose another"),
    ],
)
def test_what_resume_names_in_the_run_of_output_dir_is_told(
    tmp_path: Path, named: str, said: str
) -> None:
    aside = tmp_path / "checkpoints" / "set_aside_1" / "step_00000006"
    aside.mkdir(parents=True)
    (aside / "manifest.json").write_text("{}")
    write_marker(tmp_path, Marker(kind=RUN, names={"checkpoints": None}))
    with pytest.raises(UserError) as caught:
        source = (tmp_path / named).resolve()
        check_folder(tmp_path, begins=True, program=TRAIN, source=source)
    assert str(caught.value).startswith(f"--resume {source} ") and said in str(caught.value)
