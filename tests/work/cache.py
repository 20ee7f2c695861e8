"""What workers run for ``test_base_cache.py``."""

import hashlib
import io
import os
import shutil
import signal
import sys
from contextlib import ExitStack, redirect_stdout
from io import FileIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_lora_dist.base_model import safetensors_writer
from sparse_lora_dist.base_model.cache import folder as cache_folder
from sparse_lora_dist.base_model.cache.folder import CacheFolder
from sparse_lora_dist.base_model.frozen_linear import QuantLinear
from sparse_lora_dist.base_model.quant_experts import QuantExperts
from sparse_lora_dist.base_model.safetensors_writer import SafetensorsWriter
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.zero3.parameters import gathered
from tests.work.base import config_of, load_model
from tests.work.kinds import logits_of


def load(folder: str, cache: str | None, **options: Any) -> dict[str, Any]:
    """Load, and say what came of it.

    {"bytes": hash of packed and scales of every held weight, "logits", "cached": was the cache
    read, "said", "identity"}
    """
    save, zero = options.pop("modules_to_save", ()), options.pop("zero", {})
    config = config_of(model=folder, base_cache=cache, **options)
    config = Config(model=config.model, adapter=AdapterConfig(modules_to_save=save))
    with redirect_stdout(io.StringIO()) as out:
        model = load_model(config, **zero)
    return {
        "bytes": held_bytes(model),
        "logits": logits_of(model, config.model.precision),
        "cached": model.cache is not None and model.cache.files is not None,
        "said": out.getvalue(),
        "identity": model.identity,
    }


def held_bytes(model: Model) -> dict[str, str]:
    found = {}
    for name, module in model.module.named_modules():
        layouts: dict[str, Any] = {}
        if isinstance(module, QuantLinear):
            layouts = {"": (module.layout, module.weight, module.scales)}
        elif isinstance(module, QuantExperts):
            first = {leaf: module.matrix(leaf, 0) for leaf in module.layouts}
            layouts = {leaf: (m.layout, m.packed, m.scales) for leaf, m in first.items()}
        for leaf, (layout, packed, scales) in layouts.items():
            with gathered([packed, scales]):
                found[f"{name}.{leaf}"] = _digest(
                    packed.data.view(torch.uint8)[: layout.packed_bytes],
                    scales.data.view(torch.uint8)[: layout.scale_bytes],
                )
    return found


def _digest(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def load_in_small_files(folder: str, cache: str, file_bytes: int) -> dict[str, Any]:
    """The same, the cache in files of about so many bytes."""
    with patch.object(safetensors_writer, "FILE_BYTES", file_bytes):
        return load(folder, cache)


def load_on_nodes(folder: str, caches: list[str]) -> dict[str, Any]:
    """The same as if every rank were a node of its own, with its own folder; and "begun": did this
    rank write?"""
    begun: list[bool] = []
    usual = CacheFolder.begin

    def watched(self: CacheFolder, *args: Any, **kwargs: Any) -> None:
        usual(self, *args, **kwargs)
        begun.append(self.out is not None)

    with (
        patch.object(comm, "is_first_on_its_node", lambda: True),
        patch.object(CacheFolder, "begin", watched),
    ):
        return load(folder, caches[comm.rank()]) | {"begun": any(begun)}


def load_on_a_full_disk(folder: str, caches: list[str], how: str) -> dict[str, Any]:
    """The same, where rank 0 runs out of space: it is seen before ("free"), or comes at the third
    tensor ("write"), or when all is put on disk ("sync")."""
    with ExitStack() as stack:
        if comm.rank() == 0:
            full = OSError(28, "No space left on device")
            if how == "free":
                usage = shutil.disk_usage(folder)._replace(free=1000)
                stack.enter_context(
                    patch.object(cache_folder.shutil, "disk_usage", return_value=usage)
                )
            elif how == "write":
                usual, count = SafetensorsWriter.add, iter(range(10**6))

                def add(self: SafetensorsWriter, *args: Any) -> None:
                    if next(count) == 2:
                        raise full
                    usual(self, *args)

                stack.enter_context(patch.object(SafetensorsWriter, "add", add))
            else:
                stack.enter_context(patch.object(os, "fsync", side_effect=full))
        return load_on_nodes(folder, caches)


def load_while_another_publishes(folder: str, cache: str, other: str) -> dict[str, Any]:
    """The same, where another job's cache gets the name while this one is being written."""
    usual = CacheFolder.publish

    def late(self: CacheFolder, *args: Any) -> None:
        if self.out is not None:
            shutil.copytree(other, self.final)
        usual(self, *args)

    with patch.object(CacheFolder, "publish", late):
        return load(folder, cache)


def die_while_writing(folder: str, cache: str) -> None:
    """Loading on one rank, killed in the middle of a tensor."""
    comm.start()
    usual, count = safetensors_writer._write_all, iter(range(10**6))

    def write(file: FileIO, data: memoryview) -> None:
        usual(file, data[: len(data) // 2])
        if next(count) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(file, data[len(data) // 2 :])

    with patch.object(safetensors_writer, "_write_all", write):
        load(folder, cache)


def fuse_experts(folder: Path, out: Path) -> Path:
    """The same checkpoint with the experts of a layer in one 3-D tensor each, as the model has
    them."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    layers = sorted({k.split(".")[2] for k in tensors if ".experts." in k})
    for layer in layers:
        start = f"model.layers.{layer}.block_sparse_moe.experts"
        count = len({k.split(".")[5] for k in tensors if k.startswith(start)})
        taken = {
            w: [tensors.pop(f"{start}.{e}.{w}.weight") for e in range(count)]
            for w in ("w1", "w2", "w3")
        }
        both = zip(taken["w1"], taken["w3"], strict=True)
        new = f"model.layers.{layer}.mlp.experts"
        tensors[f"{new}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
        tensors[f"{new}.down_proj"] = torch.stack(taken["w2"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", out)
    return out


if __name__ == "__main__":
    die_while_writing(*sys.argv[1:])
