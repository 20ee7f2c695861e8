"""What workers run for ``test_ds_configs.py`` and ``test_nvme.py``: jobs whose quantised bytes are
watched wherever they are used."""

import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
    AsyncPartitionedParameterSwapper as Swapper,
)
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor

from sparse_lora_dist.base_model.frozen_linear import QuantLinear
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.zero3 import nvme as zero3_nvme
from sparse_lora_dist.zero3.parameters import gathered
from tests.work.base import (
    compare_with_bitsandbytes,
    config_of,
    engine_config_of,
    quantized_linears,
    small_method,
    whole_weights,
)
from tests.work.run import refusal_unread, train


@dataclass
class Watched:
    """What a job saw on this rank."""

    compared: Counter[str] = field(default_factory=Counter)
    """Uses of a quantised linear whose bytes were bitsandbytes' own, by where."""
    gathers: Counter[int] = field(default_factory=Counter)
    """Parameter gathers, by ranks in the group."""
    on_disk: int = 0
    """Tensors whose shares lay on NVMe at the end."""


def train_watched(
    flags: list[str], folder: str, *, gather_first: bool = False, swap_from: int | None = None
) -> Watched:
    """The main job on the model in ``folder``, every use of a quantised linear compared with
    bitsandbytes' on the whole weight.

    Args:
        gather_first: compare before the first forward too.
        swap_from: bytes of the smallest share that goes to NVMe; DeepSpeed's 1 MiB is too much for
            small models.
    """
    watched, whole = Watched(), whole_weights(folder)
    names: dict[int, str] = {}
    weight, start, finish = QuantLinear.weight_OI, Job.start, Job.finish
    gather = partition_parameters._dist_allgather_fn

    def compare(layer: QuantLinear, where: str) -> None:
        with patch.object(QuantLinear, "weight_OI", weight):
            compare_with_bitsandbytes(layer, whole[f"{names[id(layer)]}.weight"])
        watched.compared[where] += 1

    def compare_all(job: Job, where: str) -> None:
        for layer in quantized_linears(job.model).values():
            with gathered([layer.weight, layer.scales]):
                compare(layer, where)

    def watched_weight(layer: QuantLinear, dtype: torch.dtype) -> Tensor:
        backward = torch._C._current_graph_task_id() != -1
        mode = "training" if layer.training else "evaluating"
        if id(layer) in names:  # not in the forwards that look at the model before the job starts
            compare(layer, "backward" if backward else mode)
        return weight(layer, dtype)

    def watched_start(job: Job, *args: Any) -> None:
        names.update({id(layer): n for n, layer in quantized_linears(job.model).items()})
        assert names
        if gather_first:
            compare_all(job, "before")
        start(job, *args)

    def watched_finish(job: Job) -> None:
        compare_all(job, "after")
        finish(job)
        shares = [p.ds_tensor for p in job.model.module.parameters()]
        watched.on_disk = sum(share.final_location == "nvme" for share in shares)

    def counted(own: Any, out: Any, group: Any = None) -> Any:
        watched.gathers[torch.distributed.get_world_size(group)] += 1
        return gather(own, out, group)

    with ExitStack() as patches:
        patches.enter_context(patch.object(QuantLinear, "weight_OI", watched_weight))
        patches.enter_context(patch.object(Job, "start", watched_start))
        patches.enter_context(patch.object(Job, "finish", watched_finish))
        patches.enter_context(patch.object(partition_parameters, "_dist_allgather_fn", counted))
        if swap_from is not None:

            def swappable(swapper: Any, param: Any = None, numel: int = 0) -> bool:
                return numel * swapper.swap_element_size >= swap_from

            patches.enter_context(patch.object(Swapper, "swappable_tensor", swappable))
        train(flags)
    return watched


def load_on_disk(folder: str, offload: dict[str, Any]) -> list[tuple[int, int]]:
    """Load with the shipped sizes, compare every linear, return (elements of the share, bytes of
    its file) of what went to disk."""
    config = config_of(model=folder, precision="bf16")
    engine_config = engine_config_of(config, offload_param=offload)
    zero3_nvme.prepare(engine_config)
    model = Model.open(config)
    model.load(config, small_method(), engine_config)
    whole = whole_weights(folder)
    for name, layer in quantized_linears(model).items():
        with gathered([layer.weight, layer.scales]):
            compare_with_bitsandbytes(layer, whole[f"{name}.weight"])
    found = []
    for p in model.module.parameters():
        if p.ds_tensor.final_location == "nvme":
            assert p.ds_tensor.numel() == 1, "nothing of the share is left in memory"
            found.append((p.ds_tensor.ds_numel, Path(p.nvme_swapper.get_path(p)).stat().st_size))
    return found


def refusal_with_little_space(flags: list[str]) -> str:
    """The message of a job whose disks have 10,000 bytes left."""
    usage = shutil.disk_usage("/")._replace(free=10_000)
    with patch.object(shutil, "disk_usage", lambda path: usage):
        return refusal_unread(flags)


def refusal_in(flags: list[str], environment: dict[str, str]) -> str:
    """The message of a job that must end before a weight is read, with more environment."""
    with patch.dict("os.environ", environment):
        return refusal_unread(flags)


def gathered_in_training(flags: list[str]) -> tuple[int, int]:
    """Run the main job; how often frozen and trained parameters were gathered after its start."""
    counts: Counter[bool] = Counter()
    kinds = (partition_parameters.AllGatherCoalescedHandle, partition_parameters.AllGatherHandle)
    begin = Job.start

    def started(job: Job, *args: Any) -> None:
        counts.clear()
        begin(job, *args)

    def counting(make: Any) -> Any:
        def made(self: Any, *args: Any, **rest: Any) -> None:
            params = rest["params"] if "params" in rest else args[1]
            counts.update(
                p.requires_grad for p in (params if isinstance(params, list) else [params])
            )
            make(self, *args, **rest)

        return made

    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(patch.object(kind, "__init__", counting(kind.__init__)))
        stack.enter_context(patch.object(Job, "start", started))
        train(flags)
    return counts[False], counts[True]
