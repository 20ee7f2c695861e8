"""Attention by the lengths of the documents: what it computes, where it is used, where refused.

The kernel needs a GPU. Here a loop over tokens takes its place, with the same arguments; sdpa with
the mask of transformers is what it must equal.

Shapes: M rows, T tokens of a row, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
)
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import VARLEN, ModelConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model import attention
from sparse_lora_dist.model.attention import Fit, fit_of, settle_attention
from sparse_lora_dist.tasks import packed_attention
from sparse_lora_dist.tasks.packed_attention import Documents, PackedMask, packed, why_no_kernel
from tests.conftest import Ranks
from tests.fixtures.families import APART, EXPERTS, HEADS, USUAL, WINDOW
from tests.fixtures.plain_attention import attention_by_bounds, attention_by_loop
from tests.fixtures.tiny_run import TinyRun

CPU = torch.device("cpu")
LENGTHS = ((7, 3, 6, 4), (13, 7))
"""Documents of two rows; the last of each is the padding."""
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
FAMILIES = ("llama", "mistral", "gemma3_text", "qwen2", "cohere2", "gpt_neox")
"""Grouped queries; a window in all layers; in some, with a scale of its own; biases; layers without
positions; as many keys as queries."""


def built(family: str, device: str = "cpu", attention: str = "sdpa", **more: Any) -> Any:
    """A model with random weights, or on the meta device with none."""
    options = {**USUAL, **APART.get(family, {}), "sliding_window": 4, **more}
    if "layer_types" in APART.get(family, {}):
        options["layer_types"] = ["sliding_attention", "full_attention"]
    config = CONFIG_MAPPING[family](**options)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train()


@pytest.fixture
def kernel() -> Iterator[list[dict[str, Any]]]:
    """The loop in the kernel's place, on the CPU and in fp32 too. Returns what it was called with,
    call by call."""
    calls: list[dict[str, Any]] = []

    def loop(*args: Any, **named: Any) -> Tensor:
        calls.append({"bounds": args[3], **named})
        return attention_by_loop(*args, **named)

    with (
        patch.object(packed_attention, "varlen_attn", loop),
        patch.object(packed_attention, "_has_kernel", lambda q: True),
    ):
        yield calls


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 100, POSITIONS.shape, generator=generator)


def trained(model: PreTrainedModel, *, by_lengths: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, loss and gradients of two packed rows. Backward runs after all documents were
    forgotten. Padding has no loss."""
    model.set_attn_implementation(VARLEN if by_lengths else "sdpa")
    model.zero_grad()
    ids_MT = tokens()
    with packed(POSITIONS, CPU):
        logits = model(input_ids=ids_MT, position_ids=POSITIONS, use_cache=False).logits
    labels_MT = ids_MT.clone()
    for row, lengths in enumerate(LENGTHS):
        labels_MT[row, -lengths[-1] :] = -100
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels_MT[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_the_block_mask(
    kernel: list[dict[str, Any]], family: str, checkpointing: bool
) -> None:
    model = built(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = trained(model, by_lengths=False)
    assert kernel == []
    ours = trained(model, by_lengths=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    layers = model.config.num_hidden_layers
    assert len(kernel) == layers * (2 if checkpointing else 1)
    assert len({id(call["bounds"]) for call in kernel}) == 1, "made once a micro-batch"
    assert expected[2].keys() == {name for name, _ in model.named_parameters()}


def test_windows_count_as_the_mask_counts_them(kernel: list[dict[str, Any]]) -> None:
    """transformers' window of 4 is a token and three before it; one of 13 or more is none here."""
    trained(built("mistral"), by_lengths=True)
    trained(built("gemma3_text"), by_lengths=True)
    trained(built("mistral", sliding_window=12), by_lengths=True)
    trained(built("mistral", sliding_window=13), by_lengths=True)
    windows = [call["window_size"][0] for call in kernel]
    assert windows == [3, 3, 3, -1, 11, 11, -1, -1]
    assert {call["window_size"][1] for call in kernel} == {0}


def test_bounds_of_documents() -> None:
    documents = Documents(POSITIONS, CPU)
    assert documents.bounds.tolist() == [0, 7, 10, 16, 20, 33, 40]
    assert documents.bounds.dtype == torch.int32 and documents.longest == 13
    one = Documents(torch.tensor([[0, 0, 0]]), CPU)
    assert one.bounds.tolist() == [0, 1, 2, 3] and one.longest == 1
    going_on = Documents(torch.tensor([[0, 1], [2, 3]]), CPU)
    assert going_on.bounds.tolist() == [0, 2, 4], "a row begins a document"


@pytest.mark.parametrize("window", [None, 1, 4, 5, 64])
def test_the_whole_mask_is_that_of_transformers(window: int | None) -> None:
    model = built("mistral", sliding_window=window)
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    expected = make(
        config=model.config,
        inputs_embeds=torch.zeros(*POSITIONS.shape, 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=POSITIONS,
    )
    mask = PackedMask(Documents(POSITIONS, CPU), window)
    assert torch.equal(mask.whole_M1TT, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_everything_else_is_sdpa_to_the_bit(kernel: list[dict[str, Any]], family: str) -> None:
    """Held-out rows, padded rows with a mask, other rows than those of the documents, and texts
    that are generated."""
    ids_MT, mask_MT = tokens(), torch.ones_like(POSITIONS)
    mask_MT[0, -4:] = 0
    inputs = {"input_ids": ids_MT, "use_cache": False}
    cases: list[dict[str, Any]] = [
        {**inputs, "position_ids": POSITIONS},
        {**inputs, "attention_mask": mask_MT},
        {**inputs, "attention_mask": mask_MT.flip(1)},
        inputs,
    ]
    found = []
    for name in ("sdpa", VARLEN):
        model = built(family).eval()
        model.set_attn_implementation(name)
        logits = [model(**case).logits for case in cases]
        with packed(POSITIONS, CPU):
            logits.append(model(**inputs, attention_mask=mask_MT).logits)
            few = {k: v[:, :9] for k, v in cases[0].items() if k != "use_cache"}
            logits.append(model(**few, use_cache=False).logits)
        text = model.generate(ids_MT[:, :5], max_new_tokens=6, do_sample=False)
        found.append([*logits, text])
    for ours, usual in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, usual)
    assert kernel == []


@pytest.mark.parametrize("kind", ["chunks", "a function of the model", "both directions", "cache"])
def test_other_masks_are_those_of_sdpa(kind: str) -> None:
    """Although documents are there."""
    make, more, cache = {
        "chunks": (create_chunked_causal_mask, {}, None),
        "a function of the model": (
            create_causal_mask,
            {"and_mask_function": lambda batch, head, q, k: (q - k) % 2 == 0},
            None,
        ),
        "both directions": (create_bidirectional_mask, {}, None),
        "cache": (create_causal_mask, {}, DynamicCache()),
    }[kind]
    if cache is not None:
        cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    if make is not create_bidirectional_mask:
        more = {**more, "position_ids": POSITIONS}
    found = []
    for name in ("sdpa", VARLEN):
        config = built("llama", "meta", attention=name).config
        config.attention_chunk_size = 4
        inputs = {"attention_mask": None, "past_key_values": cache, **more}
        with packed(POSITIONS, CPU):
            mask = make(config=config, inputs_embeds=torch.zeros(*POSITIONS.shape, 1), **inputs)
        found.append(mask)
    assert (found[0] is None and found[1] is None) or torch.equal(*found)
    assert (found[0] is None) == (kind == "both directions")


def test_classifiers_never_call_it(kernel: list[dict[str, Any]]) -> None:
    from transformers import AutoModelForSequenceClassification

    config = CONFIG_MAPPING["llama"](**USUAL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForSequenceClassification.from_config(config)
    mask_MT = torch.ones_like(POSITIONS)
    mask_MT[1, -7:] = 0
    usual = model(input_ids=tokens(), attention_mask=mask_MT).logits
    model.set_attn_implementation(VARLEN)
    with packed(POSITIONS, CPU):
        assert torch.equal(model(input_ids=tokens(), attention_mask=mask_MT).logits, usual)
    assert kernel == []


# Which models it fits


@pytest.mark.parametrize(
    ("family", "options", "sizes"),
    [
        ("llama", {}, {(4, 2, 16)}),
        ("mistral", {}, {(4, 2, 16)}),
        ("gemma3_text", {}, {(4, 2, 16)}),
        ("mixtral", {}, {(4, 2, 16)}),
        ("llama", {"head_dim": 256}, {(4, 2, 256)}),
    ],
)
def test_a_model_that_it_fits(
    family: str, options: dict[str, Any], sizes: set[tuple[int, int, int]]
) -> None:
    assert fit_of(built(family, "meta", **options)) == Fit(sizes=frozenset(sizes))


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"head_dim": 12}, "heads have a size of 12"),
        ("llama", {"head_dim": 264}, "multiples of 8 up to 256"),
        ("minicpm3", {"qk_nope_head_dim": 16}, "differ in size"),
        ("gemma2", {}, "gemma2 model is eager"),  # softcap
        ("gpt_oss", {**EXPERTS, **HEADS, **WINDOW}, "gpt_oss model is eager"),  # sinks
        ("doge", {"num_experts": 16}, "not compute its attention in transformers' usual way"),
    ],
)
def test_a_model_that_it_does_not_fit(family: str, options: dict[str, Any], words: str) -> None:
    config = CONFIG_MAPPING[family](**{**USUAL, **APART.get(family, {}), **options})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fit = fit_of(model)
    assert words in fit.reason and not fit.sizes


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_the_kernel_has_no_place_for_never_reaches_it(
    kernel: list[dict[str, Any]], name: str
) -> None:
    """A model that would pass it by chance only, past the look at its architecture."""
    q, k = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16)
    documents = Documents(POSITIONS, CPU)
    mask, module = PackedMask(documents, None), built("llama").model.layers[0].self_attn
    given = {name: torch.zeros(2, 4, 20, 20)}
    try:
        packed_attention._attention(module, q, k, k, mask, **given)
    except ValueError as refused:
        assert name == "softcap" and "softcap" in str(refused)  # by sdpa
    assert kernel == [] and documents.reasons == {packed_attention.NOT_TAKEN[name]}
    packed_attention._attention(module, q, k, k, mask)
    assert len(kernel) == 1 and documents.sizes == {(4, 2, 16)}


def test_a_window_that_was_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(**asked: Any) -> Any:
        mask = packed_attention._mask(**asked)
        return PackedMask(mask.documents, None) if isinstance(mask, PackedMask) else mask

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, VARLEN, forgets)
    assert fit_of(built("llama", "meta")).sizes
    assert "usual way" in fit_of(built("mistral", "meta", sliding_window=4096)).reason


# Which runs have it


def config_of(**options: Any) -> Config:
    return Config(model=ModelConfig(**options))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, kernel: list[dict[str, Any]]) -> None:
    """A rank that believes it is on a GPU whose kernel works."""
    monkeypatch.setattr(comm, "on_gpu", lambda: True)
    monkeypatch.setattr(comm, "device", lambda: CPU)


@pytest.mark.usefixtures("on_gpu")
def test_it_is_chosen_where_it_can_be_used() -> None:
    for asked in (None, VARLEN):
        model = built("llama", "meta")
        assert settle_attention(config_of(attn_implementation=asked), model) == ""
        assert model.config._attn_implementation == VARLEN
    others: list[dict[str, Any]] = [
        *({"attn_implementation": name} for name in ("sdpa", "eager")),
        {"precision": "fp32"},
        {"task": "seq_cls"},
    ]
    for options in others:
        model = built("llama", "meta")
        assert settle_attention(config_of(**options), model) == ""
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"head_dim": 12}, "heads have a size of 12"),
        ("gemma2", {"attention": "eager"}, "gemma2 model is eager"),
    ],
)
def test_a_model_that_cannot_have_it_is_refused_by_name_or_noted(
    family: str, options: dict[str, Any], words: str
) -> None:
    model = built(family, "meta", **options)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=words):
        settle_attention(config_of(attn_implementation=VARLEN), model)
    assert words in settle_attention(config_of(), model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs a GPU"),
        ({"precision": "fp32"}, "takes bf16, and --precision is fp32"),
        ({"task": "seq_cls"}, "--task seq_cls has none"),
    ],
)
def test_options_that_bar_it_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(comm, "on_gpu", lambda: bool(options))
    model = built("llama", "meta")
    with pytest.raises(UserError, match=words) as caught:
        settle_attention(config_of(attn_implementation=VARLEN, **options), model)
    assert "Leave it out" in str(caught.value)
    assert settle_attention(config_of(**options), model) == ""
    assert model.config._attn_implementation == "sdpa"


def test_a_device_whose_kernel_cannot_run_keeps_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU is such a device."""
    assert "_flash_attention_forward" in (why_no_kernel((4, 2, 16), torch.bfloat16, CPU) or "")
    monkeypatch.setattr(comm, "on_gpu", lambda: True)
    monkeypatch.setattr(comm, "device", lambda: CPU)
    model = built("llama", "meta")
    note = settle_attention(config_of(), model)
    assert note.startswith("packed documents are told apart by a mask: its kernel cannot run here")
    assert model.config._attn_implementation == "sdpa"
    config = config_of(attn_implementation=VARLEN)
    with pytest.raises(UserError, match="its kernel cannot run here"):
        settle_attention(config, model)
    with pytest.raises(UserError, match="needs a GPU"):
        attention.plan_attention(config, model, on_gpu=False)
    attention.plan_attention(replace(config), model, on_gpu=True)
    assert model.config._attn_implementation == VARLEN


def test_a_run_on_the_cpu_is_refused_before_loading(
    ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = tiny.flags(tmp_path_factory.mktemp("run"), attn_implementation=VARLEN)
    (said,) = ranks(1, "tests.work.run:refusal", flags=flags)
    assert "--attn_implementation varlen cannot be used: its kernel needs a GPU" in said


def test_a_run_takes_the_same_steps_as_with_sdpa(
    ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Real ZeRO-3, adapters, accumulation and activation checkpointing, and held-out losses."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "gradient_checkpointing": "true",
        "gradient_accumulation_steps": 2,
        "dropout": 0.1,
        "max_steps": 3,
        "eval_every": 3,
    }
    (sdpa,) = ranks(1, "tests.work.attention:trained", flags=tiny.flags(folder / "sdpa", **options))
    (ours,) = ranks(
        1,
        "tests.work.attention:trained",
        flags=tiny.flags(folder / "ours", **options),
        by_lengths=True,
    )
    assert sdpa.kernel_calls == []
    assert ours.losses == pytest.approx(sdpa.losses, rel=1e-4) and len(ours.losses) == 3
    assert ours.held_out == pytest.approx(sdpa.held_out, rel=1e-4) and len(ours.held_out) == 2
    layers, batches = 2, 3 * 2
    # The check after loading that documents are apart runs it too, without a gradient.
    assert [call.training for call in ours.kernel_calls].count(False) == layers
    assert len(ours.kernel_calls) == layers + 2 * layers * batches
    assert len({call.bounds for call in ours.kernel_calls}) == 1 + batches


def by_lengths(
    function: Any, device: torch.device, dtype: torch.dtype, window: int | None, size: int
) -> list[Tensor]:
    """Output and gradients of one layer, with ``function`` as the kernel."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 20, size, generator=generator) for heads in (4, 2, 2, 4)]
    *qkv, gradient = (x.to(device, dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in qkv]
    mask = PackedMask(Documents(POSITIONS, device), window)
    with patch.object(packed_attention, "varlen_attn", function):
        y_MTHD = packed_attention._by_lengths(*leaves, mask, None)
    y_MTHD.backward(gradient.transpose(1, 2))
    return [y_MTHD.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("window", [None, 5])
def test_both_plain_attentions_are_the_same(window: int | None) -> None:
    """The other one serves the pretended device."""
    plain = (attention_by_bounds, attention_by_loop)
    one, other = (by_lengths(f, CPU, torch.float32, window, 16) for f in plain)
    torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_kernel_is_the_loop(window: int | None, size: int) -> None:
    options = (torch.device("cuda"), torch.bfloat16, window, size)
    ours = by_lengths(packed_attention.varlen_attn, *options)
    torch.testing.assert_close(ours, by_lengths(attention_by_loop, *options), rtol=2e-2, atol=2e-2)
