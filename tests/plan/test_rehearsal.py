"""``benchmarks/rehearsal_70b.py``: a rank whose group is stood in for holds what a real one
does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.tiers import in_full

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RANKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of holes, of a shape whose shares begin inside blocks."""
    sys.path.insert(0, str(BENCHMARKS))
    from _sparse_checkpoint import save
    from transformers import LlamaConfig

    place = tmp_path_factory.mktemp("rehearsal")
    sizes = {"hidden_size": 200, "intermediate_size": 331, "vocab_size": 1001}
    heads = {"num_attention_heads": 10, "num_key_value_heads": 5, "num_hidden_layers": 2}
    filled = save(place, LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    (place / "filled.json").write_text(json.dumps(filled))
    return place


def rehearsed(folder: Path, rank: int) -> dict[str, Any]:
    script = BENCHMARKS / "rehearsal_70b.py"
    flags = ["--folder", str(folder), "--rank", str(rank), "--ranks", str(RANKS)]
    subprocess.run([sys.executable, str(script), *flags], check=True)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_the_files_are_holes_but_for_one_tensor_of_each_shape(folder: Path) -> None:
    files = list(folder.glob("*.safetensors"))
    apparent = sum(f.stat().st_size for f in files)
    on_disk = sum(f.stat().st_blocks * 512 for f in files)
    assert on_disk < apparent
    filled = json.loads((folder / "filled.json").read_text())
    assert len(filled) == 6, "embedding, norm, query, key, gate, down"


@pytest.mark.parametrize("rank", [in_full(0), RANKS - 1])
def test_a_rehearsed_rank_holds_what_a_real_one_does(ranks: Ranks, folder: Path, rank: int) -> None:
    real = ranks(RANKS, "tests.work.rehearsal:loaded", folder=str(folder))[rank]
    alone = rehearsed(folder, rank)
    assert {key: alone[key] for key in real} == real
    assert alone["planned_shard"] == real["shard"]
    assert len(alone["checked"]) == 6
    against = sorted(alone["checked"].values())
    assert against == sorted(2 * ["the file"] + 4 * [against[0]])
    assert "quantize_4bit" in against[0]
