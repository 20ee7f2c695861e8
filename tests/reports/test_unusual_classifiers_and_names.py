"""Classifiers whose classes are built in an unusual way, and names that are written in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, MraConfig, MraForSequenceClassification, PreTrainedModel

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Source
from sparse_lora_dist.base_model.weight_map import find_keys, find_sources
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import refuse_no_embedding
from sparse_lora_dist.model.targets import Head, find_full

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
