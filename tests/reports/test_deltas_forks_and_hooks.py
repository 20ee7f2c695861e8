"""Damaged sparse deltas, offloaded models, processes that a run forks, hooks of git."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.sparse_delta import ABOUT, STEM, apply_sparse_delta
from sparse_lora_dist.model.look import refuse_positions_after_padding
from sparse_lora_dist.run_folder import description
from sparse_lora_dist.runtime import stop_signals
from sparse_lora_dist.train import training

FILE = f"{STEM}-00001-of-00001.safetensors"


def two_linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def delta(folder: Path) -> Path:
    """Changes of both linears."""
    folder.mkdir()
    (folder / ABOUT).write_text(json.dumps({"base": "b", "shapes": {"0": [3, 4], "1": [2, 3]}}))
    tensors: dict[str, Tensor] = {}
    for name, last in (("0", 11), ("1", 5)):
        tensors[f"{name}.indices"] = torch.tensor([0, 2, last], dtype=torch.int32)
        tensors[f"{name}.values"] = torch.tensor([1.0, 2.0, 3.0])
    save_file(tensors, folder / FILE)
    return folder


def changed(**new: Tensor) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        save_file(load_file(file) | {n.replace("_", "."): t for n, t in new.items()}, file)

    return change


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


INT = torch.int32
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an index outside": (
        changed(**{"1_indices": torch.tensor([0, 2, 6], dtype=INT)}),
        "within its",
    ),
    "negative": (changed(**{"1_indices": torch.tensor([-1, 2, 5], dtype=INT)}), "within its"),
    "twice": (changed(**{"1_indices": torch.tensor([0, 2, 2], dtype=INT)}), "do not ascend"),
    "nan": (changed(**{"1_values": torch.tensor([1.0, torch.nan, 1.0])}), "finite number"),
    "too few": (changed(**{"1_values": torch.tensor([1.0, 1.0])}), "for each index"),
    "cut": (cut, "cannot be opened"),
    "missing": (Path.unlink, "the change of 0 is missing"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_delta_changes_nothing(tmp_path: Path, case: str) -> None:
    spoil, words = DAMAGED[case]
    folder, model = delta(tmp_path / "delta"), two_linears()
    spoil(folder / FILE)
    with pytest.raises(UserError, match=rf"is damaged: .*{words}"):
        apply_sparse_delta(model, folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), two_linears().parameters(), strict=True)
    )


def test_a_delta_is_added_and_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    folder, model = delta(tmp_path / "delta"), two_linears()
    applied = apply_sparse_delta(model, folder)
    change = (model[1].weight - two_linears()[1].weight).flatten().tolist()  # type: ignore[operator]
    assert change == pytest.approx([1, 0, 2, 0, 0, 3], abs=1e-6)
    applied.undo()
    model[1].to("meta")
    with pytest.raises(UserError, match=r"1\.weight is in no memory: it is offloaded"):
        apply_sparse_delta(model, folder)
    assert torch.equal(model[0].weight, two_linears()[0].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("shapes", [[], None, {"0": 5}])
def test_a_delta_whose_shapes_are_damaged_changes_nothing(tmp_path: Path, shapes: object) -> None:
    folder = delta(tmp_path / "delta")
    (folder / ABOUT).write_text(json.dumps({"base": "b", "shapes": shapes} if shapes != [] else []))
    with pytest.raises(UserError, match="holds no sparse delta|was made for shape"):
        apply_sparse_delta(two_linears(), folder)


@pytest.mark.parametrize("how", ["codes", "transposed"])
def test_weights_that_no_delta_can_be_added_to_are_refused(tmp_path: Path, how: str) -> None:
    folder, model = delta(tmp_path / "delta"), two_linears()
    weight = model[1].weight.data  # type: ignore[union-attr]
    other = weight.to(torch.float8_e4m3fn) if how == "codes" else weight.t().contiguous().t()
    model[1].weight = nn.Parameter(other, requires_grad=False)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"1\.weight is (quantised|not contiguous)"):
        apply_sparse_delta(model, folder)
    assert torch.equal(model[0].weight, two_linears()[0].weight)  # type: ignore[arg-type]


def test_a_request_to_stop_is_that_of_the_outer_run_again_after_an_inner_one() -> None:
    with stop_signals.listening("1h"):
        outer = stop_signals._request
        with stop_signals.listening(None):
            assert stop_signals._request is not outer
        assert stop_signals._request is outer
    assert stop_signals._request is None


def test_a_run_in_another_thread_is_refused_while_one_is_open() -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with stop_signals.listening(None):
                pass
        except UserError as error:
            said.append(str(error))

    with stop_signals.listening(None):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and "Another thread of this process is making a run" in said[0]
    other()
    assert len(said) == 1


def test_positions_that_begin_after_padding_are_refused_by_name() -> None:
    for kind, differs in (("roberta", True), ("bert", False)):
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
        config = CONFIG_MAPPING[kind](**sizes, num_hidden_layers=1, vocab_size=30, is_decoder=True)
        model = AutoModelForCausalLM.from_config(config)
        if differs:
            with pytest.raises(
                UserError, match="A roberta model counts positions from its padding"
            ):
                refuse_positions_after_padding(model)
        else:
            refuse_positions_after_padding(model)


def test_verify_is_no_option_of_a_training(tmp_path: Path) -> None:
    config: Any = load_config([f"--verify={tmp_path}"])
    with pytest.raises(UserError, match="verify checks checkpoints and trains nothing"):
        with training(config):
            raise AssertionError("it began to train")


@pytest.mark.usefixtures("processes")
def test_the_commit_is_that_of_the_program_in_a_hook_of_another_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = description.git_commit()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert description.git_commit() == own


FORKS = """
import multiprocessing, os, signal
from sparse_lora_dist.runtime import stop_signals
from sparse_lora_dist.errors import Stopped

with stop_signals.listening(None):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
    stop_signals.check()
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):
        try:
            stop_signals.check()
        except Stopped as why:
            print("stopped by", why)
            break
        __import__("time").sleep(0.05)
"""


@pytest.mark.usefixtures("processes")
def test_a_pool_that_ends_its_workers_does_not_stop_the_run() -> None:
    assert stop_signals.SIGNALS
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=100, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "goes on" in done.stdout and "stopped by SIGTERM" in done.stdout
