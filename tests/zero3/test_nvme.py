"""Shares on a local disk: the run and the bytes of shares in memory, and one clear error before
anything is loaded where it cannot work. The disk is a temporary folder; the reads and writes are
DeepSpeed's own."""

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.zero3 import nvme as zero3_nvme
from tests.config.test_ds_configs import SHIPPED, USES, WATCHED, engine_file, numbers
from tests.conftest import Ranks
from tests.fixtures.tiny_models import save_llama
from tests.fixtures.tiny_run import TinyRun
from tests.work.offload import Watched

# The first one builds the op.
pytestmark = pytest.mark.timeout(1800)

BUFFERS = {"pin_memory": True, "buffer_count": 5, "buffer_size": 20_000}


def nvme_file(folder: Path, *, buffer_count: int = 5, **zero: Any) -> Path:
    """zero3_nvme.json with a folder for a disk and buffers for a tiny model."""
    block = {"device": "nvme", "nvme_path": str(folder)} | BUFFERS
    return engine_file(
        folder,
        "zero3_nvme",
        **zero,
        offload_param=block | {"buffer_count": buffer_count},
        stage3_param_persistence_threshold=0,
        stage3_prefetch_bucket_size=20_000,
    )


# With 2 buffers a layer's seven linears and their scales can never be in them together.
@pytest.mark.parametrize(("size", "buffers"), [(1, 2), (2, 5), (3, 2)])
def test_shares_on_disk_change_no_loss_and_no_byte(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, async_io: None, size: int, buffers: int
) -> None:
    zero3 = engine_file(tmp_path, "zero3", stage3_param_persistence_threshold=0)
    nvme = nvme_file(tmp_path, buffer_count=buffers)
    options = {"max_steps": 4, "eval_every": 2}
    ranks(
        size, "tests.work.run:train", flags=tiny.flags(tmp_path / "a", ds_config=zero3, **options)
    )
    words = tiny.flags(tmp_path / "b", ds_config=nvme, **options)
    parts = [words] if size != 2 else [[*words, "--stop_after", "2"], [*words, "--resume", "auto"]]
    for part in parts:
        seen: list[Watched] = ranks(
            size, WATCHED, flags=part, folder=tiny.model, gather_first=True, swap_from=1024
        )
        for watched in seen:
            assert watched.compared.keys() >= USES - {"evaluating"}
            assert watched.on_disk >= 8
    # To rounding: a disk's shares are gathered a module at a time, others a layer (decision 112).
    assert numbers(tmp_path / "b") == pytest.approx(numbers(tmp_path / "a"), rel=1e-5)
    one, other = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in "ab")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)
    norms = [
        [row.get("grad_norm", 0.0) for row in read_records(tmp_path / n / "metrics.jsonl")]
        for n in "ab"
    ]
    for one_norm, other_norm in zip(*norms, strict=True):
        assert one_norm == pytest.approx(other_norm, rel=1e-4), "clipping included"


def test_checkpointing_masters_on_the_host_and_modules_in_full(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, async_io: None
) -> None:
    """What trains stays in memory, however large its share."""
    host = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    files = [
        engine_file(tmp_path, "zero3", stage3_param_persistence_threshold=0, **host),
        nvme_file(tmp_path, **host),
    ]
    for name, file in zip("ab", files, strict=True):
        words = tiny.flags(
            tmp_path / name,
            ds_config=file,
            max_steps=3,
            max_grad_norm=0,
            modules_to_save="embed_tokens",
            gradient_checkpointing="true",
        )
        seen = ranks(2, WATCHED, flags=words, folder=tiny.model, swap_from=1024)
    assert all(watched.on_disk >= 8 for watched in seen)
    assert numbers(tmp_path / "a") == pytest.approx(numbers(tmp_path / "b"), rel=1e-5)


@pytest.mark.parametrize("buffer_size", [600_000, 500_000])
def test_shares_of_real_size(
    ranks: Ranks, tmp_path: Path, async_io: None, buffer_size: int
) -> None:
    """DeepSpeed moves shares of 1 MiB and more; these do not fill whole KiB."""
    model = save_llama(
        tmp_path / "model",
        hidden_size=1024,
        intermediate_size=4201,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    offload = (
        {"device": "nvme", "nvme_path": str(tmp_path)} | BUFFERS | {"buffer_size": buffer_size}
    )
    share = 1024 * 4201 // 2 // 2 // 2  # 4 bits a weight, 2 bytes an element, 2 ranks
    if buffer_size < share:
        with pytest.raises(AssertionError, match=rf"buffer_size is 500000 elements.* has {share}"):
            ranks(2, "tests.work.offload:load_on_disk", folder=model, offload=offload)
        return
    for found in ranks(2, "tests.work.offload:load_on_disk", folder=model, offload=offload):
        assert found == [(share, -(-2 * share // 1024) * 1024)] * 3


# What must be told before anything is loaded.


def test_a_folder_another_job_is_in_is_refused(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    words = tiny.flags(tmp_path / "run", ds_config=nvme_file(tmp_path))
    with (tmp_path / "rank1.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for said in ranks(2, "tests.work.run:refusal_before_data", flags=words):
            assert "in use by another job" in said and str(tmp_path) in said


def test_what_an_earlier_job_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "zero_stage_3" / "bfloat16params" / "rank0"
    left.mkdir(parents=True)
    (left / "0_param.tensor.swp").write_bytes(b"x")
    zero3_nvme.claim(tmp_path)
    assert not left.exists()
    zero3_nvme.claim(tmp_path)  # again, by the job that has it
    zero3_nvme._claims.pop(tmp_path / "rank0.lock").close()  # a program ends with it


def test_a_machine_that_cannot_build_the_op_is_told_what_to_install(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    words = tiny.flags(tmp_path / "run", ds_config=nvme_file(tmp_path))
    without = {"CC": "/no/compiler"}
    for said in ranks(2, "tests.work.offload:refusal_in", flags=words, environment=without):
        assert "apt install libaio-dev" in said
    assert not (tmp_path / "run").exists()


def test_the_lock_of_a_killed_build_is_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    long_ago = time.time() - 2 * zero3_nvme.QUIET_S
    os.utime(lock, (long_ago, long_ago))
    zero3_nvme.wait_for_another_build(lock.parent)
    assert not lock.exists()
    assert f"{lock} was left by a build that was killed" in capsys.readouterr().out


def test_a_build_that_goes_on_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    ends = threading.Timer(0.3, lock.unlink)
    ends.start()
    zero3_nvme.wait_for_another_build(tmp_path)
    assert not lock.exists()


def test_a_lock_that_goes_while_its_folder_is_listed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    lock.touch()

    def ended_just_now(folder: Path) -> list[Path]:
        lock.unlink()
        return []

    monkeypatch.setattr(Path, "iterdir", ended_just_now)
    zero3_nvme.wait_for_another_build(tmp_path)
    assert not lock.exists()


def test_a_disk_with_too_little_space_is_refused(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, async_io: None
) -> None:
    words = tiny.flags(tmp_path / "run", ds_config=nvme_file(tmp_path))
    for said in ranks(2, "tests.work.offload:refusal_with_little_space", flags=words):
        assert "has 0.01 MB free" in said and "at least" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_losses_are_those_of_shares_in_its_memory(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, async_io: None
) -> None:
    files = [SHIPPED / "zero3.json", nvme_file(tmp_path)]
    for name, file in zip("ab", files, strict=True):
        words = tiny.flags(tmp_path / name, ds_config=file, max_steps=5)
        (watched,) = ranks(1, WATCHED, flags=words, folder=tiny.model, swap_from=1024)
    assert watched.on_disk >= 8
    assert numbers(tmp_path / "b") == pytest.approx(numbers(tmp_path / "a"), abs=1e-5)
