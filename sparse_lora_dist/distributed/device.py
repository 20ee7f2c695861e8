"""Choose whether this process computes on a GPU or on the CPU, before DeepSpeed is imported, and
describe the device for the screen. Compute with the same bits each time where that is asked for."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.errors import UserError

COUNT = "SLURM_GPUS_ON_NODE"
DEEPSPEED = "CROSS_SIZE"
"""Variable that the launcher deepspeed sets. It numbers the devices of a CPU in VISIBLE too."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
SIGNS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", COUNT, VISIBLE)
"""Environment variables with which Slurm or a person says that this job has a GPU."""
NO_DEVICE = ("", "-1", "NoDevFiles")
"""Values of these variables that mean no GPU."""
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
SAME_BITS = {
    # Two streams could otherwise share a workspace, which changes the order of sums.
    CUBLAS: (":4096:8", ":16:8"),
    # Sums inside the switch of the GPUs are not said to be the same each time.
    "NCCL_NVLS_ENABLE": ("0",),
}
"""Environment variables -> values with which GPUs give the same bits each time (cuBLAS, section
"Results reproducibility"). The first is set where the user has set none."""
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA's major version -> oldest NVIDIA driver branch that runs it (NVIDIA's CUDA compatibility
guide, "minor version compatibility")."""
GROUP_ENTRIES = 2**22
"""Maximum number of entries of a group of tensors that are read together. A larger tensor is read
alone."""
DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/version")
"""File in which the kernel's driver says its version."""


def choose_device(asked: str) -> None:
    """Make DeepSpeed and this package compute on the device that was asked for. Not a collective,
    and to be called before DeepSpeed is imported, which reads DS_ACCELERATOR then.

    Args:
        asked: value of ``--device``: auto, cuda or cpu. auto takes the GPU if there is one, and the
            CPU only where nothing says that there should be one.

    Raises:
        UserError: a GPU was asked for, or this machine has one, and PyTorch cannot use it.
    """
    usual = os.environ.get("DS_ACCELERATOR")
    if asked == "cuda" and usual not in (None, "cuda"):
        raise UserError(
            f"--device cuda, but the environment has DS_ACCELERATOR={usual}. Unset that variable, "
            "or leave --device out."
        )
    if asked == "auto" and usual not in (None, "cuda"):
        return
    if asked == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif not torch.cuda.is_available():
        _refuse_unless_none("cuda" if usual else asked, os.environ)
        os.environ["DS_ACCELERATOR"] = "cpu"


def check_same_bits(asked: bool) -> None:
    """Raise UserError if ``asked`` and an environment variable is set so that a GPU's bits may
    differ. Not a collective."""
    for name, values in SAME_BITS.items() if asked else ():
        if (found := os.environ.get(name, values[0])) not in values:
            raise UserError(
                f"--deterministic needs {name}={' or '.join(values)}, but the environment has "
                f"{found!r}. Unset that variable, or leave --deterministic out."
            )


@contextmanager
def same_bits(asked: bool) -> Iterator[None]:
    """Context manager in which torch's operations on a GPU give the same bits each time, if
    ``asked``. To be entered before anything is computed. Not a collective."""
    if not asked:
        yield
        return
    os.environ |= {name: values[0] for name, values in SAME_BITS.items()} | dict(os.environ)
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def _refuse_unless_none(asked: str, environ: Mapping[str, str]) -> None:
    sign = sign_of_gpu(environ, DEVICES)
    if sign is None and asked == "auto":
        return
    given = "DS_ACCELERATOR=cuda" if "DS_ACCELERATOR" in environ else "--device cuda"
    found = f"There is a GPU here ({sign})" if sign else f"{given} was given"
    raise UserError(
        f"{found}, but PyTorch cannot use it: {why_no_gpu(environ)} To compute on the CPU all the "
        "same, give --device cpu (in Python: DS_ACCELERATOR=cpu in the environment)."
    )


def sign_of_gpu(environ: Mapping[str, str], devices: Path) -> str | None:
    """Return what says that this process should have a GPU; None if nothing does.

    Args:
        environ: environment variables.
        devices: the folder /dev.
    """
    for file in sorted(devices.glob("nvidia[0-9]*")):
        return str(file)
    for name in SIGNS:
        value = environ.get(name, "").strip()
        if name == VISIBLE and DEEPSPEED in environ:
            continue
        if value not in NO_DEVICE and (name, value) != (COUNT, "0"):
            return f"{name}={value}"
    return None


def why_no_gpu(environ: Mapping[str, str]) -> str:
    """Return why PyTorch cannot use a GPU, and what to do, in sentences."""
    version = torch.version.cuda
    if version is None:
        return (
            f"this is a build for CPUs (torch {torch.__version__}). Install the build for CUDA "
            "(https://pytorch.org/get-started/locally)."
        )
    hidden = environ.get(VISIBLE)
    if hidden is not None and hidden.strip() in NO_DEVICE:
        return f"{VISIBLE}={hidden} hides it. Unset that variable."
    try:
        torch.cuda.init()
        reason = "it finds no device."
    except (RuntimeError, AssertionError) as error:
        reason = f"{' '.join(str(error).split()).rstrip('.')}."
    least = LEAST_DRIVER.get(int(version.split(".")[0]))
    needs = "" if least is None else f" It needs an NVIDIA driver of at least {least}"
    has = "" if (driver := driver_version()) is None else f", and {driver} is installed"
    return (
        f"{reason} torch {torch.__version__} was built for CUDA {version}.{needs}{has}. Look at "
        "nvidia-smi, update the driver, or install a build of PyTorch for an older CUDA "
        "(pip install torch --index-url https://download.pytorch.org/whl/cu126)."
    )


def driver_version() -> str | None:
    """Return the version of NVIDIA's kernel driver; None if none is loaded."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER.read_text())
    except OSError:
        return None
    return found and found[1]


@contextmanager
def torch_as_it_starts() -> Iterator[None]:
    """Context manager with torch's settings of a new process, whatever the calling program has set:
    gradients, no autocast, fp32 and the CPU as defaults of new tensors. Not a collective."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for name in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(name, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def moved(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return copies of tensors on a device. The host waits neither for the device nor for the copy,
    and one copy is made for all. Not a collective.

    Args:
        device: the device; on the CPU the tensors are returned as they are.
        tensors: tensors on the CPU, of one shape and dtype.
    """
    if device.type != "cuda":
        return tuple(t.to(device) for t in tensors)
    return torch.stack(tensors).pin_memory().to(device, non_blocking=True).unbind()


def groups_of(sizes: Mapping[str, int]) -> list[list[str]]:
    """Put tensors into groups of at most ``GROUP_ENTRIES`` entries, in their order.

    Args:
        sizes: tensor name -> number of entries.

    Returns:
        The names of each group, at least one.
    """
    groups: list[list[str]] = []
    entries = 0
    for name, size in sizes.items():
        if not groups or entries + size > GROUP_ENTRIES:
            groups.append([])
            entries = 0
        groups[-1].append(name)
        entries += size
    return groups


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors in host memory, each with storage of its own. Not a collective.

    The host waits for the GPU once for many of them, not for each.

    Args:
        tensors: name -> tensor.
    """
    found = {name: t.to("cpu", copy=True) for name, t in tensors.items() if t.device.type == "cpu"}
    others = {name: t for name, t in tensors.items() if name not in found}
    for dtype in dict.fromkeys(t.dtype for t in others.values()):
        sizes = {name: t.numel() for name, t in others.items() if t.dtype == dtype}
        for names in groups_of(sizes):
            flat = [others[name].flatten() for name in names]
            whole = (torch.cat(flat) if len(flat) > 1 else flat[0]).cpu()
            for name, part in zip(names, whole.split([sizes[n] for n in names]), strict=True):
                found[name] = part.clone().view(others[name].shape)
    return {name: found[name] for name in tensors}


def find_same_gpu(gpus: Sequence[str | None]) -> tuple[int, int] | None:
    """Return the first two ranks that have the same GPU; None if there are none.

    Args:
        gpus: for each rank, the id of its GPU; None if it has none.
    """
    first: dict[str, int] = {}
    for place, gpu in enumerate(gpus):
        if gpu is not None and first.setdefault(gpu, place) != place:
            return first[gpu], place
    return None


def device_in_words(on_gpu: bool) -> str:
    """Return the device of this rank with its memory and versions, for the screen.

    Args:
        on_gpu: whether this rank computes on a GPU.
    """
    if not on_gpu:
        return "CPU"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    driver = driver_version() or "unknown"
    return (
        f"{found.name}, {found.total_memory / 1e9:.1f} GB; driver {driver}, CUDA "
        f"{torch.version.cuda}, NCCL {nccl}"
    )
