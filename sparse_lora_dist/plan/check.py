"""The plan at the start of training: one line from rank 0, and a warning if it does not fit."""

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
    """Print on rank 0 the memory that the run will need, before any weight is read.

    Never refuses a run, because the plan may be wrong. Not collective.
    """
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
    except Exception as error:  # a model that cannot run on the meta device may raise anything
        print_line("memory", f"not planned: this model cannot be run on shapes alone ({error})")
        return
    limits = memory_here()
    program = f"python launcher/plan.py --config {config.run.output_dir}/run.yaml"
    spread = f"--world_size {ranks.world_size} --nodes {nodes}"
    spread += f" --gpu_memory {limits.gpu}B --host_memory {limits.host}B"
    print_line("memory", f"{need_text(need, limits, ranks)} (plan: {program} {spread})")
    if not need.fits(limits):
        print_line(
            "warning", "the run does not fit by this plan; the command above says what to change"
        )


def memory_here() -> Limits:
    """All memory of this rank's GPU (0 on a CPU), and the free memory of this machine."""
    gpu = torch.cuda.mem_get_info()[1] if comm.on_gpu() else 0
    return Limits(gpu=gpu, host=psutil.virtual_memory().available)


def need_text(need: Need, limits: Limits, ranks: Ranks) -> str:
    """Text of what the run needs and what there is: "about 20.1 of 24.0 GB a GPU, ..."."""
    assert limits.host is not None
    host = f"{need.host / 1e9:.1f} of {limits.host / 1e9:.1f} GB"
    if not ranks.on_gpu:
        return f"about {host} of this machine's memory"
    return f"about {need.gpu / 1e9:.1f} of {limits.gpu / 1e9:.1f} GB per GPU, {host} of host memory"
