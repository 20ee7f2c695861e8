"""Memory check at the start of training: rank 0 prints the memory that the planner expects the run
to need, and a warning if there is less."""

import os
from collections.abc import Mapping
from shlex import quote
from typing import Any

import torch

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.launch_slurm import in_a_job
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.plan.advice import Limits, Need, need_of
from sparse_lora_dist.plan.host_memory import host_memory, mem_option
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes
from sparse_lora_dist.tasks.class_head import modules_inside


def say_whether_it_fits(config: Config, model: Model, engine_config: Mapping[str, Any]) -> None:
    """Print on rank 0 the memory that the run will need, and a warning if there is less.

    Training calls it before weights are read, so that even a run that dies while loading has
    printed the line. It never stops a run, because the plan may be wrong. Ranks other than rank 0
    return at once: it is not a collective.

    Args:
        config: all options of the run.
        model: the model on the meta device, and its sites (the linears that get adapters).
        engine_config: content of the engine file, which is the DeepSpeed JSON file.
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
        whole=model.whole,
        config=config,
    )
    try:
        need = need_of(shapes, PlannedEngine.of(engine_config), ranks)
    except Exception as error:  # a model that cannot run on the meta device may raise anything
        print_line("memory", f"not planned ({error}). The run goes on without this check.")
        return
    limits, owner = memory_here()
    program = f"python launcher/plan.py --config {quote(f'{config.run.output_dir}/run.yaml')}"
    spread = f"--world_size {ranks.world_size} --nodes {nodes}"
    spread += f" --gpu_memory {limits.gpu}B --host_memory {limits.host}B"
    print_line("memory", f"{need_text(need, limits, ranks, owner)} (plan: {program} {spread})")
    if not need.fits(limits):
        print_line("warning", advice(need, limits))


def advice(need: Need, limits: Limits) -> str:
    """Return what to do about a run that needs more memory than there is.

    Args:
        need: the memory that the run needs.
        limits: the memory that is available.
    """
    text = (
        "By this plan, the run does not fit into memory. Run the command above: it lists changes "
        "that save memory."
    )
    lacks_host = limits.host is not None and need.host > limits.host
    if lacks_host and in_a_job(os.environ):
        text += f" Or ask for more: sbatch {mem_option(need.host)}"
    return text


def memory_here() -> tuple[Limits, str]:
    """Return the memory that there is here, in bytes, and whose host memory it is.

    Returns:
        A tuple of two. The limits: gpu: all memory of this rank's GPU, in use or not; 0 if the rank
        is on a CPU; host: memory that the ranks of this machine may use. And the owner of the host
        memory, from ``HostMemory``.
    """
    gpu = torch.cuda.mem_get_info()[1] if comm.on_gpu() else 0
    host = host_memory(comm.ranks_on_this_machine(), os.environ)
    return Limits(gpu=gpu, host=host.bytes), host.owner


def need_text(need: Need, limits: Limits, ranks: Ranks, owner: str) -> str:
    """Return the needed and the available memory as text, in GB of 10^9 bytes.

    On GPUs: "about 20.10 of 24.00 GB per GPU, 9.51 of 64.00 GB of the host memory of this machine".
    On CPUs: "about 9.51 of 64.00 GB of the memory of this machine".

    Args:
        need: the memory that the run needs.
        limits: the memory that is available; its ``host`` must not be None.
        ranks: the ranks of the job; ``on_gpu`` selects between the two texts.
        owner: whose host memory it is, such as "this machine".
    """
    assert limits.host is not None
    host = f"{need.host / 1e9:.2f} of {limits.host / 1e9:.2f} GB"
    if not ranks.on_gpu:
        return f"about {host} of the memory of {owner}"
    gpu = f"{need.gpu / 1e9:.2f} of {limits.gpu / 1e9:.2f} GB per GPU"
    return f"about {gpu}, {host} of the host memory of {owner}"
