"""Models and tokenizers that a run cannot use, and what is said of them: T5 and BART as causal
language models, models of tables, vocabularies of tiktoken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    PretrainedConfig,
    T5Config,
    TapasConfig,
    WhisperConfig,
)

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.training import feed

BART = BartConfig(architectures=["BartForConditionalGeneration"])


def refusal(config: PretrainedConfig, task: str) -> str:
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    with pytest.raises(UserError) as caught:
        meta_model(config, task=task, dtype=torch.float32, **options)
    return str(caught.value)


@pytest.mark.parametrize("config", [T5Config(), BART], ids=["t5", "bart"])
def test_an_encoder_decoder_is_no_causal_language_model(config: PretrainedConfig) -> None:
    said = refusal(config, "causal_lm")
    assert said.startswith(f"{config.model_type} is an encoder-decoder")
    assert said.endswith(
        "Choose a decoder model, or train a classifier with launcher/train.py --task seq_cls."
    )


def test_no_classifier_is_advised_where_there_is_none() -> None:
    said = refusal(WhisperConfig(architectures=["WhisperModel"]), "causal_lm")
    assert "encoder-decoder" in said and "seq_cls" not in said


def test_a_model_of_tables_is_called_so() -> None:
    assert refusal(TapasConfig(), "seq_cls").startswith("tapas reads tables")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"IQ== 0\nIg== 1\n", "Its tokenizer.model is of tiktoken. Give a folder with a tokenizer"),
        (b"\n\x0e\n\x05<unk>\x15", "Its tokenizer.model is of SentencePiece. Run: pip install"),
    ],
    ids=["tiktoken", "sentencepiece"],
)
def test_a_vocabulary_has_the_name_of_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    monkeypatch.setattr(feed, "find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert feed._advice(tmp_path).startswith(said)
