"""Only linears that a text runs get an adapter, and only those that the model calls are quantised.

Reports: haotian-liu/LLaVA#1380, NVIDIA-NeMo/Automodel#3031, unslothai/unsloth#1319 (vision towers);
huggingface/peft#2274, #2556, #3554 (weights that are read without calling the linear).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BigBirdConfig,
    BigBirdForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.look import look_at, refuse_changing_weights
from sparse_lora_dist.model.targets import find_sites
from sparse_lora_dist.plan.playback.parameters import planned_parameters
from sparse_lora_dist.plan.shapes import shapes_of
from tests.conftest import Ranks
from tests.fixtures.families import config_of, gemma_that_sees
from tests.fixtures.tiny_run import TinyRun
from tests.reports.test_packing_in_other_architectures import with_model
from tests.tiers import in_full


def on_meta(config: PretrainedConfig, task: str = "causal_lm") -> PreTrainedModel:
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    return meta_model(config, task=task, dtype=torch.bfloat16, **options)


def sites_of(model: PreTrainedModel, wanted: Any = "all-linear") -> tuple[list[str], list[str]]:
    adapter = AdapterConfig(rank=2, target_modules=wanted)
    sites, notes = find_sites(model, adapter, (), look_at(model, "causal_lm"))
    return [site.name for site in sites], notes


def test_a_vision_tower_gets_no_adapter_and_one_line_says_so() -> None:
    names, notes = sites_of(on_meta(gemma_that_sees()))
    assert len(names) == 14 and all("language_model" in name for name in names)
    assert notes == [
        "8 linears (model.vision_tower.encoder.layers.0.self_attn.k_proj, ...) get no adapter, "
        "because a text does not run them"
    ]


def test_an_adapter_on_the_vision_tower_alone_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        sites_of(on_meta(gemma_that_sees()), ".*vision_tower.*")
    assert "names only linears that can get no adapter: 8 linears" in str(caught.value)
    assert "because a text does not run them. Name others, or use all-linear." in str(caught.value)


def test_modules_that_no_text_runs_are_known() -> None:
    look = look_at(on_meta(gemma_that_sees()), "causal_lm")
    assert "model.multi_modal_projector.mm_soft_emb_norm" in look.untrained
    assert "model.vision_tower.post_layernorm" in look.untrained
    assert not [name for name in look.untrained if name.endswith(("embed_tokens", "lm_head"))]
    assert not [name for name in look.untrained if "language_model.layers.0." in name]


def test_attention_to_an_encoder_that_is_not_there_gets_no_adapter() -> None:
    names, notes = sites_of(on_meta(config_of("bart")))
    assert len(names) == 12 and not any("encoder_attn" in name for name in names)
    assert notes[0].startswith("8 linears (model.decoder.layers.0.encoder_attn.k_proj, ...)")


def test_the_experts_that_no_token_of_a_look_went_to_are_no_such_linears() -> None:
    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[1](x)

    model = on_meta(config_of("llama"))
    model.model.layers[1].mlp = Routed()
    assert look_at(model, "causal_lm").unrun == frozenset()


@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("jamba", {"dt_proj"}),
        ("mamba", {"dt_proj", "x_proj", "out_proj"}),
        *(
            in_full(name, {"out_proj"})
            for name in ("mamba2", "bamba", "granitemoehybrid", "zamba2", "nemotron_h")
        ),
        in_full("falcon_mamba", {"dt_proj", "x_proj", "out_proj"}),
        in_full("llama", set()),
        in_full("bloom", set()),
    ],
)
def test_a_weight_that_is_used_without_its_linear_is_left_as_it_is(
    family: str, left: set[str]
) -> None:
    model = on_meta(config_of(family))
    look = look_at(model, "causal_lm")
    of_head = {"lm_head"}  # Mamba asks for its dtype
    assert {name.rpartition(".")[2] for name in look.read} - of_head == left
    names, notes = sites_of(model)
    assert not set(names) & look.read
    assert [note.partition(", because ")[2] for note in notes] == (
        ["the model uses their weight without calling them"] if left else []
    )


def test_an_adapter_on_such_a_weight_alone_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        sites_of(on_meta(config_of("jamba")), ("q_proj", "dt_proj"))
    assert "--target_modules dt_proj names only linears that can get no adapter" in str(
        caught.value
    )


def test_a_model_that_changes_its_weights_is_found(processes: None) -> None:  # it asks for ninja
    changed = look_at(on_meta(config_of("rwkv")), "causal_lm").changed
    assert changed is not None and changed.endswith(".weight")


@pytest.mark.parametrize("kind", ["block_sparse", "original_full"])
def test_a_model_that_changes_its_attention_at_a_short_batch_is_refused(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BigBirdConfig(vocab_size=100, num_attention_heads=4, attention_type=kind, **sizes)
    with torch.device("meta"):
        model = BigBirdForSequenceClassification(config)
    look = look_at(model, "seq_cls")
    if kind == "original_full":
        assert look.switched == ""
        return
    with pytest.raises(UserError) as caught:
        refuse_changing_weights(model, look)
    assert "sets attention_type from 'block_sparse' to 'original_full'" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", "Conv1D"), ("falcon", "FalconLinear"), ("openai-gpt", "Conv1D")]
)
@pytest.mark.parametrize("wanted", ["all-linear", ("c_attn",)])
def test_a_model_without_linears_is_refused_by_their_class(
    family: str, kind: str, wanted: Any
) -> None:
    with pytest.raises(UserError) as caught:
        sites_of(on_meta(config_of(family)), wanted)
    assert str(caught.value) == (
        f"A {family} model cannot be trained here: its layers have no nn.Linear but {kind}. Only "
        "nn.Linear itself can be held in 4 bits and get an adapter. Choose another --model."
    )


@pytest.fixture(scope="module")
def jamba(tiny: TinyRun, model_on_disk: None, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return with_model(tiny, tmp_path_factory.mktemp("jamba"), "jamba")


def test_the_planner_plans_what_a_run_would_do(jamba: TinyRun, tmp_path: Path) -> None:
    config = load_config(jamba.flags(tmp_path / "run"))
    shapes = shapes_of(config)
    assert not any("dt_proj" in site.name for site in shapes.sites)
    assert any("because the model uses their weight" in note for note in shapes.notes)
    assert any(note.startswith("--packing is false") for note in shapes.notes)
    assert shapes.config.data.packing is False
    kinds = {p.name: p.kind for p in shapes.parameters}
    left = planned_parameters(
        shapes.model, (), shapes.method, (), quantize=False, double_quant=False, dtype=shapes.dtype
    )
    whole = {p.name: p.kind for p in left}
    name = "model.layers.0.mamba.dt_proj.weight"
    assert kinds[name] == whole[name]
    with pytest.raises(UserError, match="--packing true cannot be used"):
        shapes_of(replace(config, data=replace(config.data, packing=True)))


def test_a_run_over_such_a_model_trains(ranks: Ranks, jamba: TinyRun, tmp_path: Path) -> None:
    flags = jamba.flags(tmp_path / "run", max_steps=2, target_modules=("q_proj", "v_proj"))
    said = ranks(1, "tests.work.run:train", flags=flags)[0]
    assert "not quantised: model.layers.0.mamba.dt_proj" in said
