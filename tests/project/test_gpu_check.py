"""``benchmarks/gpu_check.py``: what a CPU can try of it, before a GPU is there."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import start_context

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "benchmarks/gpu_check.py", "--tiny", "--out"]
NEEDS_GPU = {"sanitizer", "gpu tests"}
NO_GPU = "skipped: needs a GPU"
TIMED = Counter(
    {
        ("70B", "lora", "zero3"): 1,
        ("70B PEFT", "peft", None): 1,
        ("8B", "lora", "zero3"): 2,
        ("8B PEFT", "peft", None): 2,
        ("8B whole", "lora", "whole"): 2,
        ("8B sparse", "lora", "zero3"): 1,
        ("8B sparse", "roselora", "zero3"): 1,
        ("8B sparse", "adalora", "zero3"): 1,
        ("8B packed", "lora", "zero3"): 1,
        ("70B in 24 GB", "lora", "zero3_offload"): 1,
    }
)
"""(part, way, engine file) -> numbers of rows that it is timed with."""

sys.path.insert(0, str(ROOT / "benchmarks"))

Rows = list[dict[str, Any]]


def call(folder: Path, *words: str) -> str:
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*COMMAND, str(folder), *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows_in(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text().splitlines()]


def of_part(rows: Rows, part: str) -> Rows:
    return [row for row in rows if row["part"] == part and "ended" not in row]


def ends(rows: Rows) -> list[tuple[str, str]]:
    return [(row["part"], row["ended"]) for row in rows if "ended" in row]


@pytest.fixture(scope="module")
def folder(processes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every part, on shapes of a toy."""
    place = tmp_path_factory.mktemp("gpu_check")
    call(place)
    return place


@pytest.fixture
def rows(folder: Path) -> Rows:
    return rows_in(folder / "tiny.jsonl")


def test_every_part_ends_rightly_or_says_that_it_needs_a_gpu(folder: Path, rows: Rows) -> None:
    errors = [row["error"] for row in rows if "error" in row]
    assert not errors, errors[0]
    found = dict(ends(rows))
    parts = {"facts", "smoke", "kernels", "packing", "same bits", *(part for part, *_ in TIMED)}
    assert {part for part, ended in found.items() if ended == "ok"} == parts
    assert {part for part, ended in found.items() if ended == "left out"} == NEEDS_GPU
    assert {row["why"] for row in rows if row.get("ended") == "left out"} == {NO_GPU}
    assert not list(folder.glob("*.md"))


def test_every_timed_part_leaves_its_figures(rows: Rows) -> None:
    timed = [row for row in rows if "tokens_per_s" in row]
    assert Counter((row["part"], row["way"], row["engine"]) for row in timed) == TIMED
    for row in timed:
        assert row["finite"]
        assert row["tokens_per_s"] > 0 and row["host_s"] > 0 and row["short_step_s"] > 0
        assert row["documents"] == (8 if row["part"] == "8B packed" else 1)
        # Of the third step, the first that counts.
        by_hand = row["rows"] * row["tokens"] / row["step_s"][2]
        assert len(row["step_s"]) == 3 and row["tokens_per_s"] == pytest.approx(by_hand, rel=0.05)
        # ln 512, what random weights give over as many tokens.
        assert row["loss"][0] == pytest.approx(6.238, abs=0.1)


def test_losses_are_compared_with_those_of_a_cpu(rows: Rows) -> None:
    lora, adalora = of_part(rows, "smoke")
    for row in (lora, adalora):
        assert len(row["losses"]) == len(row["on_cpu"]) == 6
        assert row["most"] == 0.0  # both were CPUs here, and one was stopped and resumed
    assert lora["losses"][0] == adalora["losses"][0] != 0
    assert lora["losses"][1:] != adalora["losses"][1:]


def test_single_operations_are_checked(rows: Rows) -> None:
    bf16, fp32, times = of_part(rows, "kernels")
    assert bf16["shards_equal"] == fp32["shards_equal"] == 14  # seven shapes, two kinds of scales
    assert set(times["milliseconds"]) == {"copy", "product", "dequantise", "kthvalue", "sort"}
    assert all(value > 0 for value in times["milliseconds"].values())
    packing = {row["attention"]: row for row in of_part(rows, "packing")}
    assert {"sdpa", "eager"} <= set(packing)
    for row in packing.values():
        assert row["others"] == 0.0 and row["own"] > 0.1 and row["unmarked"] > 0.01
    assert all(row["same"] and row["losses_same"] for row in of_part(rows, "same bits"))


def test_a_second_call_does_nothing_again(folder: Path, rows: Rows) -> None:
    said = call(folder)
    later = rows_in(folder / "tiny.jsonl")[len(rows) :]
    assert {row["part"] for row in later} == NEEDS_GPU
    assert said.count("done before") == len(ends(rows)) - len(NEEDS_GPU)


def test_a_part_is_done_again_when_asked(folder: Path) -> None:
    before = rows_in(folder / "tiny.jsonl")
    call(folder, "--part", "facts", "--again")
    later = rows_in(folder / "tiny.jsonl")[len(before) :]
    assert ends(later) == [("facts", "ok")]
    assert torch.__version__.startswith(later[0]["versions"]["torch"])


def test_parts_end_in_every_way_and_the_rest_goes_on(processes: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.work.gpu_check", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = rows_in(tmp_path / "results.jsonl")
    one_call = [
        ("raises", "failed"),
        ("leaves", "failed"),
        ("stays", "limit"),
        ("dear", "left out"),
        ("gpu", "left out"),
        ("right", "ok"),
    ]
    assert ends(rows) == [*one_call, *one_call[:-1]]  # only what ended rightly is done
    why = {row["part"]: row["why"] for row in rows if "why" in row}
    assert why["leaves"] == "status 3"
    assert why["stays"] == "more than 4 s"
    assert "takes about 1000000 s" in why["dear"]
    assert why["gpu"] == NO_GPU
    _, error = of_part(rows, "raises")[:2]
    assert error["error"].endswith("ValueError: of this part\n")
    assert of_part(rows, "right") == [{"part": "right", "words": "said", "tiny": False}]
    children = [row["child"] for row in rows if "child" in row]
    assert len(children) == 4 and all(map(is_gone, children)), "a part takes its children along"


def is_gone(process: int) -> bool:
    """Dead, or dead and waited for by nobody."""
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_random_base_has_the_modules_that_transformers_makes(
    processes: None, model_on_disk: None, tmp_path: Path
) -> None:
    from _gpu_steps import config_of, random_base
    from _usual_way import quantised_peft, with_lora
    from transformers import LlamaForCausalLM

    config = config_of("tiny")
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "rank": 4, "gradient_checkpointing": True}
    usual = quantised_peft(str(tmp_path), **options)
    made = with_lora(random_base(config, torch.device("cpu")), **options)
    kinds = [
        {
            name: (type(module).__module__, type(module).__name__)
            for name, module in model.named_modules()
        }
        for model in (usual, made)
    ]
    assert kinds[0] == kinds[1]
    assert ("peft.tuners.lora.bnb", "Linear4bit") in kinds[1].values()
    trained = [
        {(n, p.dtype, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad}
        for model in (usual, made)
    ]
    assert trained[0] == trained[1] != set()
    buffers = [dict(model.named_buffers()) for model in (usual, made)]
    assert buffers[0].keys() == buffers[1].keys()
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], buffer)


FACTS = {
    "part": "facts",
    "versions": {"torch": "2.13.0"},
    "device": "NVIDIA H200 (a)",
    "device_bytes": 150e9,
    **dict.fromkeys(("commit", "driver", "cuda", "nccl", "cores", "python", "import_s"), 1),
}


def timed(way: str, **figures: Any) -> dict[str, Any]:
    row = {"part": way, "way": way, "engine": "zero3", "shape": "8B", "rows": 1, "tokens": 4096}
    row |= {"documents": 1}
    row |= {"load_s": 9.0, "step_s": [0.5, 0.25], "host_s": 0.2, "short_step_s": 0.1}
    row |= {"reserved_bytes": 9e9, "loss": [6.0, 5.5], "finite": True}
    return row | figures


def test_the_page_has_ratios_to_peft_of_the_same_shape_and_rows() -> None:
    from _gpu_page import name_of, page

    rows = [
        FACTS,
        timed("lora", tokens_per_s=10.0, peak_bytes=1e9),  # an earlier try
        timed("lora", tokens_per_s=6000.0, peak_bytes=8e9),
        timed("lora", tokens_per_s=7000.0, peak_bytes=16e9, rows=4, finite=False),
        timed("peft", tokens_per_s=8000.0, peak_bytes=10e9),
        timed("adalora", tokens_per_s=5000.0, peak_bytes=8e9, documents=8),
        {"part": "smoke", "most": 0.125, "said": "much"},
        {"part": "sanitizer", "error": "Traceback\nValueError: no\n"},
        {"part": "lora", "ended": "limit", "why": "more than 9 s", "seconds": 9.1},
    ]
    assert name_of(rows) == "gpu_nvidia_h200_a.md"
    text = page(rows)
    assert "| 8B, 1 x 4096, lora, zero3.json | 6000 | 0.75 | 8.00 | 0.80 |" in text
    assert "| 8B, 4 x 4096, lora, zero3.json | 7000 |  | 16.00 |  |" in text
    assert "| 8B, 1 x 4096, PEFT + bitsandbytes | 8000 |  | 10.00 |  |" in text
    assert "| 8B, 1 x 4096, 8 documents a row, adalora, zero3.json | 5000 |  | 8.00 |  |" in text
    assert "much" not in text
    assert "NOT FINITE" in text and text.count("NOT FINITE") == 1
    assert "- smoke: most 0.125" in text and "- sanitizer: ValueError: no" in text
    assert "- lora: limit (more than 9 s), 9.1 s" in text


def test_without_a_gpu_in_the_records_there_is_no_page(tmp_path: Path) -> None:
    from _gpu_page import write_page

    write_page([FACTS | {"device": None}], tmp_path)
    assert not list(tmp_path.iterdir())
    write_page([FACTS], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["gpu_nvidia_h200_a.md"]


def test_ranks_of_tests_are_not_forked_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert start_context().get_start_method() == "spawn"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert start_context().get_start_method() == "forkserver"
