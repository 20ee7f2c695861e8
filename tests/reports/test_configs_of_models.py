"""A model's config.json with values of a newer version, of a hostile one, or of nobody."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lora_dist.base_model.architecture import meta_model, read_config
from sparse_lora_dist.errors import UserError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def build(folder: Path, config: object) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    meta_model(
        read_config(folder, trust_remote_code=False),
        task="causal_lm",
        dtype=torch.float32,
        attn_implementation=None,
        trust_remote_code=False,
    )


def test_the_config_itself_is_built(tmp_path: Path) -> None:
    build(tmp_path, LLAMA)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "newer", "rope_theta": 1e4}}, "newer"),
        ({"hidden_act": "swish2"}, "swish2"),
        ({"dtype": []}, "config.json of --model"),
        ({"torch_dtype": "float7"}, "config.json of --model"),
        ({"hidden_size": 10**30}, "config.json of --model"),
        ({"vocab_size": 10**20}, "config.json of --model"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1e+12, but at most 10000 are built"),
        ({"num_attention_heads": 0}, "config.json of --model"),
        ({"num_attention_heads": "2"}, "config.json of --model"),
        ({"quantization_config": 5}, "config.json of --model"),
        ({"_attn_implementation": "org/name"}, "names the attention kernel 'org/name'"),
        ({"text_config": {"attn_implementation": "a/b"}}, "names the attention kernel 'a/b'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_no_model_has_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        build(tmp_path, LLAMA | change)
    assert said in str(caught.value) and "--model" in str(caught.value)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "text", ["null", "[]", "{", "", '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff"]
)
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path, trust_remote_code=False)
    assert f"--model: {tmp_path}/config.json" in str(caught.value)
    assert len(str(caught.value)) < 400
