"""Between forward and backward nothing of the base is alive, whatever holds it."""

from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.fixtures.tiny_models import save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("memory") / "llama", num_hidden_layers=3))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_no_gathered_or_dequantised_weight_outlives_its_use(
    ranks: Ranks, folder: str, precision: str
) -> None:
    for rank in ranks(2, "tests.work.memory:alive_bytes", folder=folder, precision=precision):
        itemsize = 2 if precision == "bf16" else 4
        weights = 3 * (60 * 60 * 2 + 30 * 60 * 2 + 37 * 60 * 3)
        assert rank.used["linears"] > weights * (0.5 + itemsize), "packed and dequantised"
        assert rank.used["embeddings and head"] >= 2 * 101 * 60 * itemsize
        assert rank.used["norms"] == 7 * 60 * itemsize
        nothing = dict.fromkeys(rank.used, 0)
        assert rank.alive == nothing
        assert rank.in_graph == nothing


def test_a_whole_base_goes_with_its_engine(ranks: Ranks, folder: str) -> None:
    """An evaluation of several adapters loads the base for each."""
    for used, left in ranks(2, "tests.work.memory:left_after_closing", folder=folder):
        assert used > 3 * 7 * 2 and left == 0


def test_the_measurement_sees_what_torchs_own_linear_keeps(ranks: Ranks, folder: str) -> None:
    for rank in ranks(2, "tests.work.memory:alive_bytes_of_plain_matmul", folder=folder):
        # The first query, key and value have no input that wants a gradient, so those may go.
        dequantised = 2 * (3 * 37 * 60 * 3 + 3 * 60 * 60 + 2 * (60 * 60 + 30 * 60 * 2))
        assert rank.in_graph["linears"] == rank.alive["linears"] == dequantised
        assert rank.alive["embeddings and head"] >= 101 * 60 * 2


def test_the_results_of_the_benchmark_say_the_same() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "base_alive.md"
    rows = [
        line.split("|")[1:-1] for line in results.read_text().splitlines() if "| linears" in line
    ]
    (ours, theirs) = [[int(cell.replace(",", "")) for cell in row[2:]] for row in rows]
    assert ours[1:] == [0, 0]
    assert theirs[1] == theirs[2] > 0.9 * theirs[0]
