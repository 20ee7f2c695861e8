"""Users started on a node with a GPU that PyTorch cannot use, and on GPUs that lack something."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.distributed import comm, device
from sparse_lora_dist.distributed.device import (
    choose_device,
    device_in_words,
    find_same_gpu,
    sign_of_gpu,
    why_no_gpu,
)
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.runtime.watchdog import _is_about_a_peer
from sparse_lora_dist.system.machine_errors import in_plain_words
from sparse_lora_dist.zero3 import engine, nvme

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version"
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which PyTorch finds no GPU. Returned is its /dev."""
    for name in (*device.SIGNS, device.DEEPSPEED, "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    (tmp_path / "dev").mkdir()
    return tmp_path / "dev"


def test_a_machine_without_a_gpu_computes_on_the_cpu(machine: Path) -> None:
    choose_device("auto")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_a_gpu_that_a_driver_is_too_old_for_is_not_passed_over(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training went on on the CPU without a word."""
    (machine / "nvidia0").touch()
    (machine.parent / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    )

    def init() -> None:
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError) as caught:
        choose_device("auto")
    said = str(caught.value)
    assert (
        f"There is a GPU here ({machine}/nvidia0), but PyTorch cannot use it: {OLD_DRIVER}" in said
    )
    assert "needs an NVIDIA driver of at least 580, and 535.104.05 is installed" in said
    assert "--device cpu" in said and "download.pytorch.org/whl/cu126" in said
    assert "DS_ACCELERATOR" not in os.environ
    choose_device("cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_a_build_for_cpus_and_hidden_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "CUDA_VISIBLE_DEVICES=-1 hides it" in why_no_gpu({"CUDA_VISIBLE_DEVICES": "-1"})
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this is a build for CPUs" in why_no_gpu({})


@pytest.mark.parametrize(
    ("environ", "sign"),
    [
        ({}, None),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        # The launcher deepspeed numbers the devices of a CPU too.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, None),
    ],
)
def test_a_job_that_was_given_a_gpu_is_known_by_its_variables(
    tmp_path: Path, environ: dict[str, str], sign: str | None
) -> None:
    assert sign_of_gpu(environ, tmp_path) == sign


def test_cuda_is_asked_for_where_there_is_none_or_the_cpu_is_set(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--device cuda was given, but PyTorch cannot use it"):
        choose_device("cuda")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match="the environment has DS_ACCELERATOR=cpu"):
        choose_device("cuda")
    choose_device("auto")  # the variable of before still asks for the CPU
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="DS_ACCELERATOR=cuda was given, but PyTorch cannot use it"):
        choose_device("auto")
    choose_device("cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(ConfigError, match="--device"):
        load_config(["--ds_config", "zero3", "--device", "gpu"])


def test_the_screen_names_the_device(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    assert device_in_words(on_gpu=False) == "CPU"
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150_754_820_096, uuid="a")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (machine.parent / "version").write_text(
        "NVRM version: Open Kernel Module  580.65.06  Release\n"
    )
    said = device_in_words(on_gpu=True)
    assert said == "NVIDIA H200, 150.8 GB; driver 580.65.06, CUDA 13.0, NCCL 2.28.9"


def test_two_ranks_on_one_gpu_are_refused() -> None:
    assert find_same_gpu(["a", "b", "a", "b"]) == (0, 2)
    assert find_same_gpu(["a", "b"]) is None
    assert find_same_gpu([None, None]) is None


def test_an_mpi_that_counts_ranks_beside_one_visible_gpu_is_taken_as_deepspeed_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed asserts LOCAL_RANK == OMPI_COMM_WORLD_LOCAL_RANK, after the base is loaded."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    comm.set_local_rank(0)
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK")
    comm.set_local_rank(0)
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ


def test_a_full_gpu_says_what_to_change() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB "
        "of which 1.10 GiB is free. Of the allocated memory 21.00 GiB is allocated by PyTorch."
    )
    said = in_plain_words(torch.OutOfMemoryError(text)) or ""
    for words in (text, "the memory of the GPU is full", "--gradient_checkpointing true"):
        assert words in said


def test_the_same_bits_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    device.check_same_bits(asked=False)
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8.*':0:0'"):
        device.check_same_bits(asked=True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    device.check_same_bits(asked=True)
    with device.same_bits(asked=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_the_same_bits_is_named() -> None:
    text = "cumsum_cuda_kernel does not have a deterministic implementation, but you set"
    said = in_plain_words(RuntimeError(text)) or ""
    assert "cumsum_cuda_kernel" in said and "--deterministic" in said


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a process exiting",
        "[1]: recvValue failed: Connection closed by remote peer node1<36822>",
    ],
)
def test_a_rank_lost_under_nccl_is_a_lost_rank(text: str) -> None:
    assert _is_about_a_peer(torch.distributed.DistBackendError(text))


def test_a_machine_without_a_compiler_computes_the_loss_with_pytorch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    real = engine.chunked_cross_entropy

    def without_compiler(*tensors: Any, backend: str, **options: Any) -> Any:
        asked.append(backend)
        if backend == "auto":
            raise RuntimeError("Failed to find C compiler. Please specify via CC")
        return real(*tensors, backend=backend, **options)

    monkeypatch.setattr(engine, "chunked_cross_entropy", without_compiler)
    monkeypatch.setattr(engine, "_loss_backend", "auto")
    monkeypatch.setattr(comm, "on_gpu", lambda: True)
    monkeypatch.setattr(comm, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(comm, "gather_objects", lambda one: [one])
    engine.check_loss_kernel()
    assert "Failed to find C compiler" in capsys.readouterr().out
    loss = engine.summed_cross_entropy(torch.zeros(3, 8), torch.zeros(3).long())
    assert float(loss) == pytest.approx(3 * torch.tensor(8.0).log().item())
    assert asked == ["auto", "torch"]


def test_nvme_without_a_cuda_toolkit_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended with DeepSpeed's TypeError."""
    monkeypatch.setattr(comm, "on_gpu", lambda: True)
    monkeypatch.setattr(nvme, "CUDA_HOME", None)
    monkeypatch.setattr(nvme, "installed_ops", {})
    assert "CUDA toolkit" in (nvme.why_not() or "")


def test_layers_as_leaves_of_zero3_need_gradient_checkpointing(tmp_path: Path) -> None:
    """The second backward pass failed: "The size of tensor a (0) must match"."""
    content = json.loads(Path("ds_configs/zero3.json").read_text())
    content["zero_optimization"]["stage3_module_granularity_threshold"] = 1000
    file = tmp_path / "leaves.json"
    file.write_text(json.dumps(content))
    options = ["--ds_config", str(file), "--gradient_checkpointing"]
    with pytest.raises(ConfigError, match="needs --gradient_checkpointing true"):
        load_config([*options, "false"])
    load_config([*options, "true"])
