"""Let torch, DeepSpeed and this package believe that the pretended device is there.

Importing this module changes the whole process: only processes of their own may do it (``run.py``).
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.fixtures.plain_attention import attention_by_bounds
from tests.pretended_device.modes import Generator, modes
from tests.pretended_device.world import (
    CUDA,
    DEFAULT,
    NCCL,
    Clock,
    Event,
    Stream,
    current_stream,
    on_stream,
    setting,
    world,
)

NCCL_DTYPES = {
    *(torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
COLLECTIVES = {
    "all_reduce": (("tensor",), ("tensor",)),
    "broadcast": (("tensor",), ("tensor",)),
    "all_gather": (("tensor",), ("tensor_list",)),
    "all_gather_into_tensor": (("input_tensor",), ("output_tensor",)),
    "reduce_scatter_tensor": (("input",), ("output",)),
    "reduce_scatter": (("input_list",), ("output",)),
}
"""Collective -> names of the arguments that it reads and that it writes."""


def install() -> None:
    """Change torch, DeepSpeed and this package. To be called once, before a run begins."""
    for name, (reads, writes) in COLLECTIVES.items():
        _on_nccl(name, reads, writes)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import bitsandbytes.functional  # noqa: F401  before torch says that there is a GPU
    from deepspeed.accelerator import real_accelerator

    real_accelerator.ds_accelerator = _accelerator()
    _torch()
    _package()


def _torch() -> None:
    # autograd.grad and Tensor.backward would switch the function mode off for all of backward.
    torch.autograd.has_torch_function = lambda *_: False  # type: ignore[attr-defined]
    torch._tensor.has_torch_function_unary = lambda *_: False  # type: ignore[attr-defined]
    torch.Generator = Generator  # type: ignore[misc, assignment]
    import torch.utils.checkpoint as checkpoint

    checkpoint._default_meta_extractor = _shape_and_dtype  # type: ignore[assignment]
    checkpoint._allowed_determinism_checks_to_fns["default"] = _shape_and_dtype
    Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "is_initialized": True,
        "empty_cache": None,
        "max_memory_allocated": 1,
        "memory_allocated": 1,
        "max_memory_reserved": 1,
        "mem_get_info": (140 * 10**9, 140 * 10**9),
        "get_device_name": "pretended",
    }.items():
        setattr(torch.cuda, name, functools.partial(_answer, answer))
    torch.cuda.synchronize = lambda *_: world.wait_for_everything()
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: None


def _answer(answer: Any, *_: Any, **__: Any) -> Any:
    return answer


def _shape_and_dtype(t: Tensor) -> dict[str, Any]:
    return {"shape": t.shape, "dtype": t.dtype}


def _package() -> None:
    from sparse_lora_dist import train
    from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
    from sparse_lora_dist.distributed import comm, console
    from sparse_lora_dist.runtime import watchdog
    from sparse_lora_dist.sparsity.decisions import Decisions
    from sparse_lora_dist.sparsity.rewriter import Rewriter
    from sparse_lora_dist.tasks import packed_attention
    from sparse_lora_dist.zero3 import engine

    join = dist.init_process_group
    comm.dist.init_process_group = lambda backend, **options: join("gloo", **options)
    comm.on_gpu = lambda: True
    comm.device = lambda: CUDA
    comm._check_devices = lambda: None
    console.device_in_words = lambda on_gpu: "pretended"
    train.check_loss_kernel = lambda: None  # Triton needs the device itself
    engine._loss_backend = "torch"
    packed_attention.varlen_attn = attention_by_bounds  # the kernel needs it too
    set_phase = watchdog.set_phase

    def seen(phase: str, **options: Any) -> None:
        world.phase = phase
        set_phase(phase, **options)

    watchdog.set_phase = seen
    _phase_of_its_own(Decisions, "make", "decision")
    _phase_of_its_own(Decisions, "confirm", "decision")
    _phase_of_its_own(Rewriter, "after", "decision")
    read = CheckpointFiles.read

    def read_under_modes(self: CheckpointFiles, *args: Any, **options: Any) -> Tensor:
        with modes():  # the thread that reads ahead has none
            return read(self, *args, **options)

    CheckpointFiles.read = read_under_modes  # type: ignore[method-assign]


def _phase_of_its_own(kind: type[Any], method: str, phase: str) -> None:
    """Count what a method launches and waits for apart from the phase that it is called in."""
    real = getattr(kind, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        before, world.phase = world.phase, phase
        try:
            return real(*args, **kwargs)
        finally:
            world.phase = before

    setattr(kind, method, call)


def _accelerator() -> Any:
    """Return an accelerator called cuda, for DeepSpeed's branches of asynchronous devices."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    def made(dtype: torch.dtype) -> property:
        return property(lambda self: functools.partial(torch.tensor, dtype=dtype, device="cuda"))

    class Pretended(CPU_Accelerator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._name = "cuda"

        def device_name(self, device_index: int | None = None) -> str:
            return "cuda" if device_index is None else f"cuda:{device_index}"

        def device(self, device_index: int | None = None) -> torch.device:
            return CUDA

    answers: dict[str, Callable[..., Any]] = {
        "is_synchronized_device": lambda self: False,
        "current_device": lambda self: 0,
        "current_device_name": lambda self: "cuda:0",
        "device_count": lambda self: 1,
        "synchronize": lambda self, device_index=None: world.wait_for_everything(),
        "stream": lambda self, stream: on_stream(stream),
        "current_stream": lambda self, device_index=None: current_stream(),
        "default_stream": lambda self, device_index=None: DEFAULT,
        "on_accelerator": lambda self, t: str(t.device).startswith("cuda:"),
        "is_fp16_supported": lambda self: True,
        "memory_stats": lambda self, device_index=None: {},
        "pin_memory": lambda self, t, *_, **__: t.pin_memory(),
        "is_pinned": lambda self, t: t.is_pinned(),
        "set_device": lambda self, index: None,
    }
    for name, answer in answers.items():
        setattr(Pretended, name, answer)
    Pretended.Stream, Pretended.Event = property(lambda s: Stream), property(lambda s: Event)
    Pretended.BFloat16Tensor, Pretended.ByteTensor = made(torch.bfloat16), made(torch.uint8)
    Pretended.FloatTensor, Pretended.DoubleTensor = made(torch.float), made(torch.double)
    Pretended.IntTensor, Pretended.LongTensor = made(torch.int), made(torch.long)
    Pretended.__abstractmethods__ = frozenset()
    return Pretended()


class _Work:
    """Handle of an asynchronous collective: waiting for it orders the current stream after it."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *_: Any, **__: Any) -> bool:
        if self._work is not None:
            self._work.wait()
        current_stream().clock.merge(self._clock)
        return True

    def is_completed(self) -> bool:
        return True


def _on_nccl(name: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
    """Let a collective of torch.distributed run as NCCL runs it: on a stream of its own, which
    waits for the caller's."""
    real = getattr(dist, name)
    signature = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        read = [t for n in reads for t in tree_leaves(given.get(n)) if isinstance(t, Tensor)]
        written = [t for n in writes for t in tree_leaves(given.get(n)) if isinstance(t, Tensor)]
        if not any(world.on_device(t) for t in read + written):
            return real(*args, **kwargs)
        for t in read + written:
            if not world.on_device(t):
                world.problem(f"mix in {name}")
            if t.dtype not in NCCL_DTYPES or not t.is_contiguous():
                world.problem(f"NCCL does not take a {t.dtype} of strides {t.stride()} in {name}")
        world.launches[world.phase][name] += 1
        NCCL.wait_stream(current_stream())
        with on_stream(NCCL):
            world.work(read, written)
        clock = Clock(NCCL.clock)
        with setting("in_collective", True):
            work = real(*args, **kwargs)
        if given.get("async_op"):
            return _Work(work, clock)
        current_stream().clock.merge(clock)
        return work

    call.__name__ = name
    setattr(dist, name, call)
    setattr(dist.distributed_c10d, name, call)
