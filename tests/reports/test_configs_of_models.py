"""A model's config.json with values of a newer version, of a hostile one, or of nobody."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model.architecture import (
    left_out,
    meta_model,
    read_config,
    refuse_experts,
)
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.plan.shapes import shapes_of
from tests.fixtures.families import EXPERTS, MLA, config_of

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
    on_meta(read_config(folder, trust_remote_code=False))


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    return meta_model(
        config,
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


def test_what_a_config_asks_of_training_and_a_run_leaves_out_is_told(tmp_path: Path) -> None:
    """unslothai/unsloth#1557: the base's own dropout; hiyouga/LlamaFactory#3276: the routers' loss.
    Both are on in a plain loop over transformers' model."""
    assert told(tmp_path, LLAMA) == []
    (dropout,) = told(tmp_path, LLAMA | {"attention_dropout": 0.25})
    assert "attention_dropout 0.25" in dropout and "--dropout" in dropout
    (dropout,) = told(tmp_path, {"model_type": "bert"})  # by default, not in the file
    assert "hidden_dropout_prob 0.1, attention_probs_dropout_prob 0.1" in dropout
    mixtral = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    mixtral |= {"router_aux_loss_coef": 0.5}
    assert told(tmp_path, mixtral) == []
    (routers,) = told(tmp_path, mixtral | {"output_router_logits": True})
    assert "router_aux_loss_coef 0.5" in routers


def told(folder: Path, config: dict[str, Any]) -> list[str]:
    (folder / "config.json").write_text(json.dumps(config))
    return left_out(read_config(folder, trust_remote_code=False))


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    """huggingface/transformers#43781: it loads both, so the base alone would be another model."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match="holds an adapter .* give that folder to launcher/train.py --init_"
    ):
        build(tmp_path, LLAMA)


def test_a_model_quantised_by_a_tool_of_before_is_named(tmp_path: Path) -> None:
    """AutoGPTQ and AutoAWQ wrote their settings into a file of their own."""
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(UserError, match="already quantised .GPTQ or AWQ., which is not supported"):
        build(tmp_path, LLAMA)


def test_an_empty_quantization_config_is_named(tmp_path: Path) -> None:
    """It was said to be of bitsandbytes. transformers asks it for a quant_method, and fails."""
    with pytest.raises(UserError, match="has an empty quantization_config .* Remove that key"):
        build(tmp_path, LLAMA | {"quantization_config": {}})


DENSE: dict[str, dict[str, Any]] = {
    "doge": {},
    "nemotron_h": {},
    "qwen2_moe": {**EXPERTS, "mlp_only_layers": [0, 1]},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 2},
}
"""Models with a number of experts in config.json, and without experts."""
MIXED: dict[str, dict[str, Any]] = {
    "doge": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {"hybrid_override_pattern": "ME"},
    "qwen2_moe": EXPERTS,
    "deepseek_v3": {**MLA, "first_k_dense_replace": 1},
    "gpt_oss": {**EXPERTS, "head_dim": 16},
    "granitemoe": EXPERTS,
    "jetmoe": EXPERTS,
    "phimoe": EXPERTS,
}


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_model_with_a_number_of_experts_is_taken(kind: str) -> None:
    refuse_experts(on_meta(config_of(kind, **DENSE[kind])))


@pytest.mark.parametrize("kind", MIXED)
def test_a_mixture_of_experts_is_refused_by_its_modules(kind: str) -> None:
    with pytest.raises(UserError, match=rf"mixture of experts \({kind}, \d+ experts, the first in"):
        refuse_experts(on_meta(config_of(kind, **MIXED[kind])))


def test_the_plan_refuses_a_mixture_of_experts_too(tmp_path: Path) -> None:
    config_of("qwen2_moe", **EXPERTS).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a mixture of experts"):
        shapes_of(load_config(["--model", str(tmp_path)]), on_gpu=False)
