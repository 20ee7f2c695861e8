"""LOAD: every rank's share of an NF4 base, against bitsandbytes and transformers, on 1 to 4
ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lora_dist.base_model.nf4 import BLOCK
from sparse_lora_dist.base_model.safetensors_reader import read_header
from tests.conftest import Ranks
from tests.fixtures.tiny_models import FAMILIES, save_family, save_llama, save_qwen
from tests.tiers import in_full

SHAPES = [(7, 9), (33, 71), (1, 1), (64, 64), (100, 130), (5, 257), (300, 200)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "one file": save_llama(root / "one"),
        "several files": save_llama(root / "several", dtype=torch.float32, max_shard_size="40KB"),
        "tied": save_llama(root / "tied", tied=True),
        "biases": save_qwen(root / "biases"),
    }
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("size", [in_full(1), 2, 3, in_full(4)])
def test_shares_together_are_what_bitsandbytes_makes_of_the_whole(ranks: Ranks, size: int) -> None:
    everyone = ranks(
        size,
        "tests.work.base:quantize_shares",
        shapes=SHAPES,
        sources={"bf16": ["bf16", "fp16", "fp32"], "fp32": ["bf16"]},
    )
    assert all(seen["plain"] == seen["double"] == len(SHAPES) * 4 for seen in everyone)
    assert everyone[0]["nested blocks"] > 3
    assert sum(seen["elements read"] for seen in everyone) >= everyone[0]["weights"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_rank_reads_its_own_share_and_receives_scales_only(
    ranks: Ranks, folders: dict[str, str], size: int
) -> None:
    folder = folders["several files"]
    everyone = ranks(
        size,
        "tests.work.base:load_and_compare",
        folder=folder,
        precision="bf16",
        double_quant=True,
    )
    linears, others = _linear_and_other_ranges(Path(folder))
    in_files = sum(stop - start for _, start, stop in linears)
    assert everyone[0].num_quantized == len(linears) == 14

    for rank in everyone:
        assert rank.report.linear_bytes_in_file == in_files
        slack = 2 * BLOCK * 4 * len(linears)  # two blocks a tensor; the file is fp32
        read = _bytes_within(rank.reads, linears)
        assert read == rank.report.linear_bytes_read
        assert read <= in_files / size + slack
        assert _bytes_within(rank.reads, others) == rank.report.other_bytes_read
        total = sum(n for _, _, n in rank.reads)
        assert total == read + rank.report.other_bytes_read, "nothing else of the files is read"
    _assert_covered(linears + others, [r for rank in everyone for r in rank.reads])

    for number, rank in enumerate(everyone):
        # An all-gather's output holds the rank's own part too; rank 0 has the means already.
        gathered = sum(n for name, n in rank.received if name == "_allgather_base_")
        means = sum(n for name, n in rank.received if name == "broadcast_")
        arrived = gathered * (size - 1) // size + means * (number > 0)
        assert arrived == rank.report.bytes_received
        if size == 1:
            assert not rank.received
            continue
        # Scales: 4 bytes a block of 64, each rank's part padded to the longest, and one offset.
        blocks = -(-rank.num_weights // BLOCK) + 2 * len(linears) * size
        assert rank.num_weights / 16 <= gathered + means <= 4 * blocks + 4 * len(linears)
        broadcasts = [n for name, n in rank.received if name == "broadcast_"]
        assert broadcasts == [4] * len(linears), "only the mean of a tensor's scales is broadcast"
        kinds = {name for name, _ in rank.received}
        assert kinds == {"broadcast_", "_allgather_base_"}


@pytest.mark.parametrize(("precision", "double_quant"), [("fp32", True), ("bf16", False)])
def test_a_whole_model_is_loaded_bit_for_bit_in_other_clothing_too(
    ranks: Ranks, folders: dict[str, str], precision: str, double_quant: bool
) -> None:
    everyone = ranks(
        3,
        "tests.work.base:load_and_compare",
        folder=folders["biases"],
        precision=precision,
        double_quant=double_quant,
    )
    assert [rank.num_quantized for rank in everyone] == [14, 14, 14]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unquantised_logits_are_those_of_transformers(
    ranks: Ranks, folders: dict[str, str], size: int, precision: str
) -> None:
    for name, folder in folders.items():
        both = ranks(size, "tests.work.base:logits_of_both", folder=folder, precision=precision)
        assert all(rank["equal"] for rank in both), (name, [rank["distance"] for rank in both])
        assert all(rank["tied"] == (name == "tied") for rank in both)
        share = -(-both[0]["whole"] // size)
        assert [rank["held"] for rank in both] == [share] * size, "the embedding is partitioned"


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_transformers(
    ranks: Ranks, families: Path, size: int, family: str
) -> None:
    folder = families / family
    if not folder.exists():
        save_family(folder, family)
    for rank in ranks(size, "tests.work.base:logits_of_both", folder=str(folder), precision="bf16"):
        assert rank["equal"], rank["distance"]


def _linear_and_other_ranges(folder: Path) -> tuple[list[Any], list[Any]]:
    """(file, first byte, end) of every tensor that is quantised, and of every other."""
    linears, others = [], []
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            size = torch.Size(entry.shape).numel() * entry.itemsize
            part = linears if name.endswith("_proj.weight") else others
            part.append((file.name, entry.start, entry.start + size))
    return linears, others


def _bytes_within(reads: list[Any], ranges: list[Any]) -> int:
    inside = [
        n
        for file, first, n in reads
        if any(file == f and start <= first and first + n <= stop for f, start, stop in ranges)
    ]
    return sum(inside)


def _assert_covered(ranges: list[Any], reads: list[Any]) -> None:
    for file, start, stop in ranges:
        at = start
        for first, n in sorted((first, n) for f, first, n in reads if f == file):
            if first <= at < first + n:
                at = first + n
        assert at >= stop, f"{file}: byte {at} of {start} to {stop} was read by nobody"


def test_what_is_no_plain_linear_is_loaded_and_listed(ranks: Ranks, tmp_path: Path) -> None:
    for got in ranks(2, "tests.work.base:load_odd_module", folder=str(tmp_path)):
        assert got["bias"], "a buffer of the state dict comes from the file"
        assert got["forgotten"] == [0.0] * 3, "one that is computed does not"
        assert got["unquantized"] == {"experts": 2 * 8 * 64 * 2}
