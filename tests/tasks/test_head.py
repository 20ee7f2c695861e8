"""The loss without logits: the numbers of the whole ones, none of their memory."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.tasks.logit_ops import OperationRecorder
from sparse_lora_dist.tasks.loss_head import _filled_up
from tests.conftest import Ranks
from tests.fixtures.tiny_models import save_family, save_llama
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import byte_tokenizer
from tests.tiers import grid, in_full
from tests.work.head import CHUNK_ROWS, ROWS, TOKENS

# Kind, what it adds to the tiny sizes, and how many operations follow its head.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({}, 0),
    "qwen3": ({"tie_word_embeddings": True, "head_dim": 10}, 0),
    "phi": ({"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_act": "gelu"}, 0),
    "gemma2": ({"head_dim": 10, "final_logit_softcapping": 0.5}, 3),
    "granite": ({"logits_scaling": 3.0}, 1),
    "cohere": ({"logit_scale": 0.25}, 1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("heads")
    return {
        k: str(save_family(place / k, k, dtype=torch.float32, **sizes))
        for k, (sizes, _) in MODELS.items()
    }


def assert_alike(everyone: list[Any], tolerance: float) -> None:
    for rank in everyone:
        chunked, whole = rank.chunked, rank.whole
        torch.testing.assert_close(chunked.losses, whole.losses, rtol=tolerance / 5, atol=1e-6)
        assert chunked.held_out == pytest.approx(whole.held_out, rel=tolerance / 5)
        assert chunked.gradients.keys() == whole.gradients.keys()
        for name, gradient in whole.gradients.items():
            distance = (chunked.gradients[name] - gradient).norm()
            assert distance <= tolerance * gradient.norm(), (name, distance, gradient.norm())
    assert any(g.norm() > 0 for g in everyone[0].whole.gradients.values())


@grid("size kind", [2, 1], list(MODELS))
def test_loss_and_gradients_are_those_of_whole_logits(
    ranks: Ranks, folders: dict[str, str], kind: str, size: int
) -> None:
    everyone = ranks(size, "tests.work.head:compare", folder=folders[kind])
    assert_alike(everyone, 1e-5)
    assert everyone[0].refused is None and everyone[0].operations == MODELS[kind][1]
    assert ("lm_head.weight" in everyone[0].names) == (kind not in ("qwen3", "gemma2", "cohere"))
    assert ("lm_head.bias" in everyone[0].names) == (kind == "phi")


@pytest.mark.parametrize("kind", [in_full("llama"), "gemma2"])
def test_in_bf16_and_with_checkpointing(ranks: Ranks, folders: dict[str, str], kind: str) -> None:
    for options in ({"precision": "bf16"}, {"checkpointing": True}):
        everyone = ranks(2, "tests.work.head:compare", folder=folders[kind], **options)
        assert_alike(everyone, 2e-2 if "precision" in options else 1e-5)


@grid("precision kind", ["fp32", "bf16"], ["llama", "phi", "granite"])
def test_a_head_trained_in_full_has_its_gradient(
    ranks: Ranks, folders: dict[str, str], kind: str, precision: str
) -> None:
    everyone = ranks(
        2, "tests.work.head:compare", folder=folders[kind], train_head=True, precision=precision
    )
    assert_alike(everyone, 1e-5 if precision == "fp32" else 2e-2)
    trained = [name for name in everyone[0].chunked.gradients if name.startswith("lm_head")]
    assert trained == ["lm_head.weight", "lm_head.bias"][: 2 if kind == "phi" else 1]
    assert all(everyone[0].whole.gradients[name].norm() > 0 for name in trained)


@pytest.mark.parametrize("chunk_rows", [1, in_full(10_000)])
def test_the_size_of_a_chunk_changes_nothing(
    ranks: Ranks, folders: dict[str, str], chunk_rows: int
) -> None:
    arguments = {"folder": folders["llama"], "chunk_rows": chunk_rows, "train_head": True}
    assert_alike(ranks(2, "tests.work.head:compare", **arguments), 1e-5)


def test_an_architecture_that_needs_whole_logits_gets_them_and_says_so_once(
    ranks: Ranks, folders: dict[str, str]
) -> None:
    everyone = ranks(2, "tests.work.head:compare", folder=folders["llama"], centred=True)
    assert_alike(everyone, 1e-5)
    assert everyone[0].refused == "aten.mean.dim"
    size = ROWS * TOKENS * 101 * 4
    assert everyone[0].said.count("are computed at once: ") == 1
    assert f"{size / 1e6:.2f} MB a micro-batch" in everyone[0].said


def test_a_head_with_an_adapter_makes_logits_and_says_so(
    ranks: Ranks, folders: dict[str, str]
) -> None:
    everyone = ranks(2, "tests.work.head:compare", folder=folders["llama"], adapt_head=True)
    assert_alike(everyone, 1e-5)
    assert everyone[0].said.count("lm_head is not a plain linear") == 1
    assert "lm_head.lora_a" in everyone[0].chunked.gradients


def test_the_heads_matmuls_have_few_sizes(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    """Each new size costs memory for good: oneDNN keeps what it made for it."""
    flags = tiny.flags(tmp_path, max_steps=50, micro_batch_size=2, packing="false")
    (shapes,) = ranks(1, "tests.work.engine:shapes_of_matmuls", flags=flags)
    vocabulary = len(byte_tokenizer())
    of_head: Counter[int] = Counter()
    for (a, b), count in shapes.items():
        of_head[a[0]] += count * (vocabulary in (a[1], b[1]))
    often = {size for size, count in of_head.items() if count > 1}
    assert of_head.total() >= 2 * 50 and len(often) <= 8, of_head
    assert {size % 8 for size in often} == {0}


@pytest.mark.parametrize("chunk", [1, 8, 131, 10_000])
def test_target_tokens_are_filled_up_to_the_next_of_few_sizes(chunk: int) -> None:
    filled = {n: _filled_up(n, chunk) for n in range(3 * min(chunk, 1000))}
    for n, size in filled.items():
        assert n <= size <= max(n + 7, 1.25 * n) and size // chunk in (n // chunk, n // chunk + 1)
    last = {size % chunk for size in filled.values()}
    assert len(last) <= 4 * chunk.bit_length()


# Memory.

VOCABULARY = 4001  # so that a micro-batch's logits are by far the largest tensor


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("wide") / "llama", vocab_size=VOCABULARY))


@pytest.mark.parametrize("train_head", [False, in_full(True)])
def test_no_tensor_of_the_logits_size_is_ever_alive(
    ranks: Ranks, wide: str, train_head: bool
) -> None:
    for rank in ranks(2, "tests.work.head:costs", folder=wide, train_head=train_head):
        for largest in rank.largest.values():
            assert largest.tokens == CHUNK_ROWS < rank.targets
            # The head's weight is larger than a chunk; ZeRO-3 gathers it with the last norm's, and
            # reduces its gradient with the adapters'.
            assert largest.elements <= VOCABULARY * 60 + (4000 if train_head else 60)
    for rank in ranks(2, "tests.work.head:costs", folder=wide, whole=True):
        for largest in rank.largest.values():
            assert largest.tokens == ROWS * TOKENS, "the measurement sees whole ones"
            assert largest.elements == ROWS * TOKENS * VOCABULARY


@pytest.mark.usefixtures("full")
def test_a_frozen_head_is_gathered_once(ranks: Ranks, wide: str) -> None:
    for rank in ranks(2, "tests.work.head:costs", folder=wide):
        assert rank.gathers == {"training": 1, "held out": 1}
    # DeepSpeed hangs a gradient on a weight that is whole only.
    for rank in ranks(2, "tests.work.head:costs", folder=wide, train_head=True):
        assert rank.gathers == {"training": 2, "held out": 1}
    for rank in ranks(2, "tests.work.head:costs", folder=wide, whole=True):
        assert rank.gathers == {"training": 2, "held out": 1}


# What follows the head.


def followed(function: Any) -> tuple[OperationRecorder, Tensor]:
    logits = torch.linspace(-3, 3, 12).view(1, 3, 4)
    watch = OperationRecorder()
    with watch:
        watch.begin(logits)
        out = function(logits)
    watch.end(out)
    return watch, out


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y,
        lambda y: y[:],
        lambda y: 30 * torch.tanh(y / 30),
        lambda y: (y.bfloat16() * 0.1).float().contiguous(),
        lambda y: y.detach().clamp(-2, 2),
    ],
)
def test_what_is_done_entry_by_entry_can_be_done_to_other_logits(function: Any) -> None:
    watch, out = followed(function)
    assert watch.refused is None
    for logits in (torch.linspace(-3, 3, 12).view(3, 4), torch.randn(5, 4)):
        again = logits
        for operation in watch.operations:
            again = operation(again)
        assert torch.equal(again, function(logits))
    assert out.numel() == 12


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y[..., :3],
        lambda y: y - y.mean(-1, keepdim=True),
        lambda y: y.mul_(2),
        lambda y: y + torch.ones(4),
        lambda y: y.softmax(-1),
        lambda y: torch.cat([y, y]),
        lambda y: y * y,
        lambda y: y / 2 + y.tanh(),
        lambda y: y.flip(-1),
        lambda y: torch.zeros(1, 3, 4),
    ],
)
def test_anything_else_is_refused(function: Any) -> None:
    assert followed(function)[0].refused is not None
