"""Buffers that are not saved with a model, such as rotary frequencies: a user trains Falcon-H1 or
Gemma 3n, and every number that the forward reads is the one that transformers reads, not what the
memory held before (huggingface/transformers#48892, #45902)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from sparse_lora_dist.base_model.architecture import EXPERT_COUNTS, meta_model, read_config
from sparse_lora_dist.base_model.buffers import fill_buffers, move_buffers
from sparse_lora_dist.errors import UserError

AUTO = {"causal_lm": AutoModelForCausalLM, "seq_cls": AutoModelForSequenceClassification}
KINDS = [
    (task, kind.model_type)
    for task, auto in AUTO.items()
    for kind in auto._model_mapping
    if kind.model_type in CONFIG_MAPPING
]
"""(task, model_type) of every model that transformers has for a task."""
LAYERS = "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers".split()
"""Keys of config.json for the number of layers; architectures use different ones."""
ONLY_IN_FILES = {"apertus", "phi4_multimodal"}
"""Models with persistent buffers that no ``_init_weights`` writes. Their files hold these."""
SIZES: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": {"num_hidden_layers": 2, "num_local_experts": 2}},
    "longcat_flash": {"num_layers": 1, "n_routed_experts": 8, "zero_expert_num": 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
}
"""What configs need that cannot be built, or not here, by their defaults."""
FALCON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "ssm_multipliers": [0.5, 0.25, 2.0, 1.5, 0.7],
}
"""A tiny Falcon-H1."""


def on_meta(task: str, config: PretrainedConfig) -> PreTrainedModel:
    return meta_model(
        config,
        task=task,
        dtype=torch.float32,
        attn_implementation=None,
        trust_remote_code=False,
    )


def filled(task: str, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The buffers of the model as this program makes them."""
    model = on_meta(task, config)
    fill_buffers(model, stored=model.state_dict().keys() if keeps_some(config) else ())
    return dict(model.named_buffers())


def keeps_some(config: PretrainedConfig) -> bool:
    return config.model_type in ONLY_IN_FILES


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that are made here go to the meta device, so that models of any size can be built;
    buffers and other tensors do not."""
    usual: Callable[..., None] = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        usual(module, name, parameter)
        if parameter is not None:
            meta = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = meta

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = usual  # type: ignore[method-assign]


def wanted(task: str, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The buffers of the model that transformers builds on the CPU."""
    with parameters_on_meta():
        model = AUTO[task].from_config(config, dtype=torch.float32)
    if any(buffer.is_meta for buffer in model.buffers()):  # torch.zeros_like(self.weight)
        model = AUTO[task].from_config(config, dtype=torch.float32)
    return dict(model.named_buffers())


def small(task: str, model_type: str) -> PretrainedConfig:
    """A config with few layers and experts, where the kind of model takes that; otherwise the
    default."""
    kind = CONFIG_MAPPING[model_type]
    given = SIZES.get(model_type, {})
    usual = kind(**given)
    layers = [key for key in LAYERS if isinstance(getattr(usual, key, None), int)]
    experts = [key for key in EXPERT_COUNTS if isinstance(getattr(usual, key, None), int)]
    two, four = dict.fromkeys(layers, 2), dict.fromkeys(layers, 4)
    for few in (two | dict.fromkeys(experts, 16), four):
        try:
            on_meta(task, kind(**few | given))
        except Exception:  # a list of the layers' kinds has another length ...
            continue
        return kind(**few | given)
    return usual


def differences(task: str, model_type: str) -> list[str]:
    """Names of the buffers that are not what transformers has, of one kind of model."""
    got, right = filled(task, small(task, model_type)), wanted(task, small(task, model_type))
    names = list(got)
    assert names == list(right)
    if model_type in ONLY_IN_FILES:
        saved = on_meta(task, small(task, model_type)).state_dict()
        names = [name for name in names if name not in saved]
    return [name for name in names if not torch.equal(got[name].cpu(), right[name])]


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal_lm", "llama"),
        ("causal_lm", "falcon_h1"),  # a parent fills the buffers of its children
        ("causal_lm", "gemma3n_text"),  # the head's class cannot fill those of the body
        ("seq_cls", "modernvbert"),  # a text encoder with an _init_weights of its own
    ],
)
def test_buffers_have_the_values_of_transformers(task: str, model_type: str) -> None:
    assert differences(task, model_type) == []


@pytest.mark.usefixtures("full", "processes")  # a model may compile something
@pytest.mark.parametrize(("task", "model_type"), KINDS)
def test_buffers_of_every_model_have_the_values_of_transformers(task: str, model_type: str) -> None:
    try:
        on_meta(task, small(task, model_type))
    except Exception:
        pytest.skip("refused, or cannot be built by transformers with default sizes")
    assert differences(task, model_type) == []


@pytest.mark.usefixtures("model_on_disk")
def test_falcon_h1_multiplies_by_what_from_pretrained_does(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["falcon_h1"](**FALCON)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    right = dict(loaded.named_buffers())
    junk = [torch.full((1, 1, 280), 123.0) for _ in range(20)]
    del junk  # memory that the buffers may get
    got = filled("causal_lm", read_config(tmp_path, trust_remote_code=False))
    vector = got["model.layers.1.mamba.mup_vector"].flatten()
    assert vector[[0, 130, 279]].tolist() == pytest.approx([0.5, 0.25, 0.7])
    assert got.keys() == right.keys()
    assert all(torch.equal(got[name], right[name]) for name in right)


def test_a_buffer_that_nothing_writes_is_refused_by_name() -> None:
    model = on_meta("causal_lm", small("causal_lm", "apertus"))
    with pytest.raises(UserError) as caught:
        fill_buffers(model)
    assert str(caught.value).startswith(
        "The base files do not hold model.layers.0.mlp.act_fn.beta, model.layers.0.mlp.act_fn.eps, "
        "model.layers.1.mlp.act_fn.beta and 1 more, and ApertusForCausalLM does not say"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4),
        torch.zeros(()),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
@pytest.mark.parametrize("written", ["nothing", "a part", "twice what was there", "chance"])
def test_no_kind_of_buffer_keeps_what_the_memory_held(wrong: torch.Tensor, written: str) -> None:
    model = on_meta("causal_lm", small("causal_lm", "llama"))
    model.register_buffer("mine", wrong.to("meta"), persistent=False)
    usual = model.initialize_weights

    def initialize() -> None:
        usual()
        mine: Any = model.mine
        if written == "a part" and mine.dim():
            mine[:3] = 1
        elif written == "twice what was there":
            mine.copy_(mine * 2)
        elif written == "chance" and mine.is_floating_point():
            mine.normal_()

    model.initialize_weights = initialize
    with pytest.raises(UserError, match="do not hold mine, and LlamaForCausalLM"):
        fill_buffers(model)


def test_buffers_that_modules_share_stay_shared() -> None:
    model = on_meta("causal_lm", small("causal_lm", "llama"))
    rotary: Any = model.model.rotary_emb
    model.register_buffer("shared", rotary.inv_freq, persistent=False)
    fill_buffers(model)
    move_buffers(model, torch.device("cpu"))
    assert model.shared is rotary.inv_freq and not rotary.inv_freq.is_meta
