"""Small random encoders as people have them on disk, and labelled sentences to train them on."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.tiny_run import WORDS, TinyRun
from tests.tiny_tokenizer import byte_tokenizer

# Large random weights: attention that prefers nothing would hide half of the mistakes.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.3,
    "type_vocab_size": 2,
}
DISTIL = {
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.15,
}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["c2p", "p2c"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MAKERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (BertConfig, BertForMaskedLM, SIZES),  # no pooler; its head is left over
    "bert-with-pooler": (BertConfig, BertModel, SIZES),  # names without "bert."
    "roberta": (RobertaConfig, RobertaForMaskedLM, {**SIZES, "type_vocab_size": 1}),
    "distilbert": (DistilBertConfig, DistilBertForMaskedLM, DISTIL),
    "deberta": (DebertaV2Config, DebertaV2Model, {**SIZES, **DEBERTA}),
    "albert": (AlbertConfig, AlbertModel, {**SIZES, "embedding_size": 16}),  # one layer, twice
    "llama": (LlamaConfig, LlamaForCausalLM, {**SIZES, "tie_word_embeddings": False}),
}
LABELS = ("good", "bad", "ugly")


def framing_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, <s> before a text and </s> after each, as encoders want them."""
    tokenizer = byte_tokenizer()
    ends = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends
    )
    return tokenizer


def save_base(folder: Path, family: str, **options: Any) -> Path:
    """A model of ``family`` with random weights and its tokenizer, as transformers saves them."""
    tokenizer = framing_tokenizer()
    config, model, sizes = MAKERS[family]
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "roberta":  # its positions begin after the padding's number
        tokens["pad_token_id"] = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config(**{**sizes, **tokens, **options})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_labelled(folder: Path, model: Path) -> TinyRun:
    """42 + 11 sentences, named by a word in them; some with a second sentence."""
    numbers = random.Random(0)
    return TinyRun(
        model=model,
        data=_write(folder / "train.jsonl", 42, numbers),
        held_out=_write(folder / "held_out.jsonl", 11, numbers),
    )


def _write(path: Path, count: int, numbers: random.Random) -> Path:
    lines = []
    for i in range(count):
        label = LABELS[i % 3]
        words = [*numbers.choices(WORDS, k=numbers.randint(1, 5)), label[0] * 3]
        second = " ".join(numbers.choices(WORDS, k=2))
        lines.append({"text": " ".join(words), "second": second, "label": label, "number": i % 3})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
