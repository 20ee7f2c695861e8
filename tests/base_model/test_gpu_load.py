"""LOAD on a GPU: reads through pinned memory, and quantising where the rank computes."""

import pytest
import torch

from tests.base_model.test_base_model import SHAPES
from tests.conftest import Ranks
from tests.fixtures.tiny_models import save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def sizes() -> list[int]:
    return [1, 2] if torch.cuda.device_count() > 1 else [1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("gpu") / "llama"
    return str(save_llama(place, hidden_size=516, intermediate_size=1792, vocab_size=1000))


@pytest.mark.parametrize("size", sizes())
def test_shares_made_on_a_gpu_are_what_bitsandbytes_makes_of_the_whole_there(
    ranks: Ranks, size: int
) -> None:
    for precision in ("bf16", "fp32"):
        everyone = ranks(size, "tests.work.gpu:quantize_shares", shapes=SHAPES, precision=precision)
        assert all(count == 2 * len(SHAPES) for count in everyone)


@pytest.mark.parametrize("size", sizes())
def test_a_range_reaches_the_gpu_in_components_as_it_is_in_the_file(
    ranks: Ranks, folder: str, size: int
) -> None:
    for rank, (same, components, device) in enumerate(
        ranks(size, "tests.work.gpu:read_in_parts", folder=folder)
    ):
        assert same
        assert components > 10
        assert device == f"cuda:{rank}"


@pytest.mark.parametrize("size", sizes())
def test_a_rank_of_a_gpu_never_holds_more_than_its_share_and_two_reads(
    ranks: Ranks, folder: str, size: int
) -> None:
    for rank in ranks(size, "tests.work.gpu:load_and_compare", folder=folder):
        assert rank["linears"] == 14
        assert rank["peak"] <= rank["shard"] + rank["work"] + 2**20, rank
        assert rank["peak"] >= rank["shard"]
        assert rank["places"] == ["cuda"]
        # Allocated by this rank on another's GPU, whoever's thread did it.
        assert rank["elsewhere"] == 0


def test_offloaded_shares_are_pinned_in_host_memory_and_made_on_the_gpu(
    ranks: Ranks, folder: str
) -> None:
    (rank,) = ranks(1, "tests.work.gpu:load_and_compare", folder=folder, offload=True)
    assert rank["linears"] == 14
    assert rank["places"] == ["cpu, pinned"]
    assert rank["peak"] <= rank["work"] + rank["largest"] + 2**20, rank
