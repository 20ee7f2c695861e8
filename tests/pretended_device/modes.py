"""Modes of torch under which tensors have a place: a function mode answers questions about devices
and moves tensors, a dispatch mode sees each operation, its launch, and what would be refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.pretended_device.world import (
    CUDA,
    DEVICE,
    HOST,
    PAGEABLE,
    PINNED,
    local,
    setting,
    world,
)

NO_LAUNCH = {
    f"aten::{name}"
    for name in (
        "empty empty_like new_empty empty_strided new_empty_strided detach alias _unsafe_view "
        "resize_ set_ _reshape_alias lift_fresh record_stream is_same_size sym_size "
        "_local_scalar_dense"
    ).split()
}
"""Operations that start no kernel. Views start none either."""
WAITS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense nonzero masked_select bincount _unique2 unique_dim "
        "unique_consecutive equal is_nonzero repeat_interleave _linalg_eigh _linalg_svd"
    ).split()
}
"""Operations after which the host waits for the device."""
INDEXED = {f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")}
"""Operations that take an index from the host too."""
FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.rand, torch.randn),
    *(torch.randint, torch.eye, torch.linspace, torch.tensor, torch.as_tensor, torch.empty_like),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor),
    *(torch.scalar_tensor, torch.empty_strided, torch.from_numpy, torch.randperm, torch.asarray),
}
"""Functions that make tensors from nothing or from Python's numbers."""
FROM_NUMBERS = {torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.scalar_tensor}
"""Functions that copy Python's numbers to the device, for which the host waits."""


IN_ANY_ORDER = {
    f"aten::{name}"
    for name in "kthvalue histc put put_ median.dim nll_loss2d_forward scatter_reduce".split()
}
"""Operations that have no deterministic implementation on a GPU, as torch's documentation of
``use_deterministic_algorithms`` lists them, and kthvalue, whose index of a tie is any."""


class Generator(torch._C.Generator):
    """A random generator that knows on which device it would be."""

    pretended: str

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, HOST)
        made.pretended = torch.device(device).type
        return made


class Operations(TorchDispatchMode):
    """Sees each operation: spreads places, counts launches and waits, records mixes and races."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name.startswith("c10d::") or getattr(local, "in_collective", False):
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = [t for t in tensors if world.on_device(t)]
        host = [t for t in tensors if world.place(t) in (PAGEABLE, PINNED)]
        into = getattr(local, "into", None)
        if name in ("aten::copy_", "aten::_copy_from") and device and host:
            return self._copy(func, args, kwargs)
        if name == "aten::_to_copy" and into is not None:
            out = func(*args, **kwargs)
            world.put(out, into)
            world.work(tensors, [out])
            return out
        if device:
            _check_mix(name, args, host, tensors)
            _count_wait(name, args)
            _check_order(name, args, kwargs)
        return self._run(func, args, kwargs, tensors, device, into)

    @staticmethod
    def _copy(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        target, source = args[0], args[1]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        own = source if world.on_device(target) else target
        crosses(own, to_device=world.on_device(target), non_blocking=non_blocking)
        world.work([source], [target])
        return func(*args, **kwargs)

    @staticmethod
    def _run(
        func: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        tensors: list[Tensor],
        device: list[Tensor],
        into: str | None,
    ) -> Any:
        on_cpu = (t.untyped_storage() for t in tensors)
        before = {s._cdata for s in on_cpu if s.device.type == "cpu"}
        out = func(*args, **kwargs)
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        fresh = [t for t in outs if _is_new(t, before)]
        place = into or (DEVICE if device else None)
        if place is None and not tensors:
            place = getattr(local, "inside", None)
        for t in fresh if place is not None else ():
            world.put(t, str(place))
        changes = func._schema.is_mutable
        is_view = bool(outs) and not fresh and not changes
        if (place == DEVICE or device) and not is_view and func._schema.name not in NO_LAUNCH:
            written = [t for t in outs if world.on_device(t)] if fresh or changes else []
            world.work([t for t in device if not any(t is w for w in written)], written)
            world.launches[world.phase][func._schema.name] += 1
        return out


def _is_new(t: Tensor, before: set[int]) -> bool:
    storage = t.untyped_storage()
    return storage.device.type == "cpu" and storage._cdata not in before


def _check_mix(name: str, args: tuple[Any, ...], host: list[Tensor], tensors: list[Tensor]) -> None:
    """Record an operation on tensors of the device and of the host. Scalars may be mixed."""
    mixed = [t for t in host if t.dim() > 0]
    if not mixed:
        return
    what = [(tuple(t.shape), str(t.dtype), world.place(t)) for t in tensors]
    if name not in INDEXED:
        world.problem(f"mix in {name} of {what}")
    elif world.on_device(args[0]) and not (
        name != "aten::index" and any(t is args[2] for t in mixed)
    ):
        world.wait(f"copy of a host index in {name}")
    else:
        world.problem(f"mix in {name}, a host tensor indexed by the device, of {what}")


def _count_wait(name: str, args: tuple[Any, ...]) -> None:
    by_mask = name in INDEXED and any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] or ()
    )
    if name in WAITS or by_mask:
        world.wait(f"{name} by a mask" if by_mask else name)


def _check_order(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record what torch would refuse under ``use_deterministic_algorithms``."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    sums_floats = (
        name in ("aten::cumsum", "aten::cumsum_")
        and (kwargs.get("dtype") or args[0].dtype).is_floating_point
    )
    if sums_floats or name in IN_ANY_ORDER:
        world.problem(f"no deterministic {name}")


def crosses(t: Tensor, *, to_device: bool, non_blocking: bool) -> None:
    """Record a copy between host and device; only one from or to pinned memory need not be waited
    for."""
    if not (non_blocking and world.place(t) == PINNED):
        world.wait("copy to the device" if to_device else "copy from the device")


class Functions(TorchFunctionMode):
    """Answers questions about devices, and makes and moves tensors as if the device were there."""

    answers: ClassVar[dict[Any, Callable[[Tensor], Any]]] = {
        Tensor.is_cuda.__get__: world.on_device,  # type: ignore[attr-defined]
        Tensor.get_device: lambda t: 0 if world.on_device(t) else -1,
        Tensor.is_pinned: lambda t: world.place(t) == PINNED,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.answers:
            return self.answers[func](args[0])
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            real = func(*args)
            return CUDA if real.type == "cpu" and world.on_device(args[0]) else real
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return func(*args) and not world.on_device(args[0])
        if func == Tensor.pin_memory:
            with setting("into", PINNED):
                return args[0].detach().clone()
        if func == Tensor.record_stream:
            return None
        if func in (Tensor.numpy, Tensor.__array__) and world.on_device(args[0]):
            world.problem("numpy() of a tensor of the device")
        if func == Tensor.tolist and world.on_device(args[0]):
            world.wait("tolist")
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _move(func, args, kwargs)
        if func in FACTORIES or kwargs.get("device") is not None:
            return _make(func, args, kwargs)
        _check_generator(func, args, kwargs)
        if any(isinstance(a, Tensor) and world.on_device(a) for a in (*args, *kwargs.values())):
            # What a composite operation makes inside, it makes where its arguments are.
            with setting("inside", DEVICE):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _check_generator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    generator = kwargs.get("generator")
    if generator is None or not args or not isinstance(args[0], Tensor):
        return
    wanted = getattr(generator, "pretended", "cpu")
    if (wanted == "cuda") != world.on_device(args[0]):
        world.problem(f"generator of {wanted} in {func.__name__}")


def _place_of(device: Any) -> str | None:
    kind = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return {"cuda": DEVICE, "cpu": PAGEABLE}.get(kind.type)


def _make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    place = None
    if kwargs.get("device") is not None:
        if (place := _place_of(kwargs["device"])) is None:
            return func(*args, **kwargs)
        kwargs["device"] = HOST
    if kwargs.pop("pin_memory", False):
        place = PINNED
    like = next((a for a in args if isinstance(a, Tensor)), None)
    if place is None:
        if like is not None and func in (torch.as_tensor, torch.asarray):
            return func(*args, **kwargs)
        keeps = like is not None and func is not torch.tensor
        place = world.place(like) if keeps and like is not None else PAGEABLE
        if place is None:
            return func(*args, **kwargs)
    elif like is not None and func in (torch.as_tensor, torch.asarray):
        device = CUDA if place == DEVICE else HOST
        return _move(Tensor.to, (like,), {"device": device, "dtype": kwargs.get("dtype")})
    if func in FROM_NUMBERS and place == DEVICE:
        world.wait("copy of Python's numbers to the device")
    with setting("into", place):
        out = func(*args, **kwargs)
    if isinstance(out, Tensor) and out is not like:
        world.put(out, place)
    return out


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t = args[0]
    device, dtype, non_blocking, copy = _parsed(func, args[1:], kwargs)
    place = world.place(t)
    wanted = None if device is None else _place_of(device)
    if place is None or (device is not None and wanted is None):  # the meta device
        target = HOST if device is not None and device.type == "cuda" else device
        return Tensor.to(t, target or t.device, dtype or t.dtype, non_blocking, copy)
    if wanted is None or (wanted == DEVICE) == (place == DEVICE):
        with setting("into", DEVICE if place == DEVICE else PAGEABLE):
            return Tensor.to(t, dtype or t.dtype, non_blocking, copy)
    crosses(t, to_device=wanted == DEVICE, non_blocking=non_blocking)
    with setting("into", wanted):
        return Tensor.to(t, dtype or t.dtype, non_blocking, True)


def _parsed(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, torch.dtype | None, bool, bool]:
    """Return (device, dtype, non_blocking, copy) of a call of to, cuda or cpu."""
    if func in (Tensor.cpu, Tensor.cuda):
        return (
            (HOST if func is Tensor.cpu else CUDA),
            None,
            kwargs.get("non_blocking", False),
            False,
        )
    copy, rest = kwargs.pop("copy", False), list(args)
    other = kwargs.pop("other", None)
    if rest and isinstance(rest[0], Tensor):
        other = rest.pop(0)
    if other is not None:
        device = CUDA if world.on_device(other) else other.device
        non_blocking = bool(rest[0]) if rest else kwargs.get("non_blocking", False)
        return device, other.dtype, non_blocking, copy
    if len(rest) > 3 or (len(rest) == 3 and isinstance(rest[0], torch.dtype)):
        copy = rest.pop()
    if isinstance(kwargs.get("device"), int):
        kwargs["device"] = torch.device("cuda", kwargs["device"])
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format" or v is not None}
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*rest, **kwargs)
    return device, dtype, non_blocking, copy


@contextmanager
def modes() -> Iterator[None]:
    """Context manager for each thread that handles tensors."""
    with Operations(), Functions():
        yield
