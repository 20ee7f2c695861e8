"""Keep small tensors that depend on sizes alone on their device, instead of making them in each
forward."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

MOST = 256
"""Most results of a function that are kept: a model has few sizes of linears."""


def kept_on_device(make: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of sizes and a device that makes tensors, so that it makes them once.

    On the meta device they are made anew, because a memory plan counts them.

    Args:
        make: the function; its last argument is the device.
    """

    @lru_cache(maxsize=MOST)
    def kept(*args: object) -> R:
        with torch.inference_mode(False):  # a later backward may save them
            return make(*args)  # type: ignore[arg-type, call-arg]

    @wraps(make)
    def found(*args: P.args, **kwargs: P.kwargs) -> R:
        is_meta = args[-1] == torch.device("meta")
        return make(*args, **kwargs) if is_meta else kept(*args)

    return found
