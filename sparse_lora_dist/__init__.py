"""Sparse low-rank adapters over a 4-bit base model that DeepSpeed ZeRO-3 shards across ranks.

The Python API is ``settings``, ``run``, ``training``, ``export_run`` and ``apply_sparse_delta``;
docs/python.md has examples. Each function is imported when it is first used, so that a program can
check its command line without waiting for the import of transformers and DeepSpeed. (The check
imports torch, which the options of the methods need.)
"""

from importlib import import_module
from os.path import isfile
from typing import TYPE_CHECKING, Any

from sparse_lora_dist.version import __version__ as __version__

if TYPE_CHECKING:
    from sparse_lora_dist.api import export_run as export_run
    from sparse_lora_dist.api import settings as settings
    from sparse_lora_dist.export.sparse_delta import apply_sparse_delta as apply_sparse_delta
    from sparse_lora_dist.train import run as run
    from sparse_lora_dist.train import training as training

if not isfile(__file__):
    raise ImportError(
        f"sparse_lora_dist reads files beside its code, and cannot be imported from within a wheel "
        f"({__path__[0]}). Run pip install with that wheel, or unpack it.",
        name=__name__,
    )

_HOMES = {
    "settings": "api",
    "run": "train",
    "training": "train",
    "export_run": "api",
    "apply_sparse_delta": "export.sparse_delta",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}. It has: {', '.join(_HOMES)}"
        )
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
