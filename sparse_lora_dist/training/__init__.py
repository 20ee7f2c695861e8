"""Make the optimizer steps of a training run, and do the work around them: data, resume, logging,
checkpoints.

This package has the name of the API function ``sparse_lora_dist.training``, so it may be called in
its place: Python binds the package to that name when one of its modules is imported.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("sparse_lora_dist.train").training(*args, **options)


sys.modules[__name__].__class__ = _Callable
