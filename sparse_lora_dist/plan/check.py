"""The planner's word at the start of a run, from rank 0: one line, a second if it will not fit."""

from collections.abc import Mapping
from typing import Any

import psutil
import torch

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.plan.advice import Limits, Need, need_of
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes
from sparse_lora_dist.tasks.class_head import modules_inside


def say_whether_it_fits(config: Config, model: Model, engine_config: Mapping[str, Any]) -> None:
    """Before a weight is read. Never refuses: what is played through on shapes may be wrong."""
    if comm.rank() != 0:
        return
    per_node = comm.ranks_on_this_machine()
    nodes = -(-comm.world_size() // per_node)
    ranks = Ranks(world_size=comm.world_size(), nodes=nodes, on_gpu=comm.on_gpu())
    shapes = Shapes(
        model=model.module,
        sites=tuple(model.sites),
        trained=tuple(modules_inside(model.full)),
        config=config,
    )
    try:
        need = need_of(shapes, PlannedEngine.of(engine_config), ranks)
    except Exception as error:  # whatever a model raises that needs more than shapes
        print_line("memory", f"not planned, this model needs more than shapes: {error}")
        return
    limits = memory_here()
    program = f"python launcher/plan.py --config {config.run.output_dir}/run.yaml"
    spread = f"--world_size {ranks.world_size} --nodes {nodes}"
    spread += f" --gpu_memory {limits.gpu}B --host_memory {limits.host}B"
    print_line("memory", f"{said(need, limits, ranks)} (plan: {program} {spread})")
    if not need.fits(limits):
        print_line(
            "warning", "by the plan this does not fit; the command above says what to change"
        )


def memory_here() -> Limits:
    """Of this rank's GPU, all of it; of this machine, what is free."""
    gpu = torch.cuda.mem_get_info()[1] if comm.on_gpu() else 0
    return Limits(gpu=gpu, host=psutil.virtual_memory().available)


def said(need: Need, limits: Limits, ranks: Ranks) -> str:
    """The need in words, beside what there is."""
    assert limits.host is not None
    host = f"{need.host / 1e9:.1f} of {limits.host / 1e9:.1f} GB"
    if not ranks.on_gpu:
        return f"about {host} of this machine"
    return f"about {need.gpu / 1e9:.1f} of {limits.gpu / 1e9:.1f} GB a GPU, {host} of host memory"
