"""What the workers of ``tests/ranks.py`` run for the planner's tests: bytes of what a run holds."""

import io
from contextlib import redirect_stdout
from typing import Any

from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.checkpoint import save
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.plan.memory import rank_memory
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks
from sparse_lora_dist.plan.shapes import shapes_of
from tests.work.run import finished_job


def real_and_planned(flags: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """{line: bytes} of this rank after a run, and of the plan for the rank that needs most."""
    config = load_config(flags)
    job = finished_job(flags)
    return _real(job), _planned(config)


def _real(job: Any) -> dict[str, int]:
    found = dict.fromkeys(("packed_weights", "scales", "unquantised_linears", "embeddings"), 0)
    found |= {"norms_and_biases": 0, "kept": 0, "persistent": 0}
    for name, parameter in job.model.module.named_parameters():
        if not parameter.requires_grad:
            owner = job.model.module.get_submodule(name.rpartition(".")[0])
            is_kept = isinstance(owner, AdapterLinear)
            kind = "kept" if is_kept else _kind(name, type(owner) is FrozenLinear)
            found[kind] += parameter.ds_tensor.nbytes
    whole = {id(t) for t in job.engine._whole}
    for name, buffer in job.model.module.named_buffers():
        if id(buffer) in whole:
            owner = job.model.module.get_submodule(name.rpartition(".")[0])
            kind = _kind(name, type(owner) is FrozenLinear)
            found[kind if comm.world_size() == 1 else "persistent"] += buffer.nbytes
    if comm.world_size() > 1:
        staying = [p for p in job.model.module.parameters() if p.ds_persist]
        found["persistent"] += sum(p.ds_numel * p.ds_tensor.itemsize for p in staying)
    zero = job.engine._zero
    flats = job.engine.flats()
    live = zero.lp_param_buffer
    found["adapter"] = live.nbytes
    found["master"] = sum(f.nbytes for f in flats if f.data_ptr() != live.data_ptr())
    found["gradients"] = zero.grad_partitions_flat_buffer.nbytes
    found["moments"] = job.shards.optimizer.state_bytes().peak
    if not job.shards.ended:
        found["statistics"] = sum(t.nbytes for s in job.shards.stats.values() for t in s)
    return found


def copied_and_planned(flags: list[str]) -> tuple[int, int]:
    """Bytes that saving copies on this rank after a run, and of the plan's line for it."""
    job = finished_job(flags)
    own, _ = save._copied_to_host(job.shards)
    copied = sum(t.nbytes for key, t in own.items() if not key.startswith("rng/"))
    return copied, _planned(load_config(flags)).get("saved_copy", 0)


def _kind(name: str, is_plain: bool) -> str:
    if "norm" in name or name.endswith("bias"):
        return "norms_and_biases"
    if "embed" in name:
        return "embeddings"
    if "lm_head" in name or is_plain:
        return "unquantised_linears"
    return "scales" if name.endswith("scales") else "packed_weights"


def _planned(config: Any) -> dict[str, int]:
    engine = PlannedEngine.of(engine_dict(config.run.ds_config, config, comm.world_size()))
    ranks = Ranks(world_size=comm.world_size(), on_gpu=False)
    memory = rank_memory(shapes_of(config), engine, ranks)
    return {line.key: line.bytes.get("pass", 0) for line in memory.lines}


def run_with_room(flags: list[str], room: int) -> str:
    """What the main job prints on a machine with so much memory left."""
    from unittest.mock import patch

    from sparse_lora_dist.plan.advice import Limits
    from tests.work.run import train

    with patch(
        "sparse_lora_dist.plan.check.memory_here", lambda: (Limits(gpu=0, host=room), "this job")
    ):
        return train(flags)


def run_that_dies_loading(flags: list[str], room: int) -> str:
    """The same, but memory ends as soon as the main job loads."""
    from unittest.mock import patch

    from sparse_lora_dist import train
    from sparse_lora_dist.plan.advice import Limits

    out = io.StringIO()
    with (
        patch(
            "sparse_lora_dist.plan.check.memory_here",
            lambda: (Limits(gpu=0, host=room), "this job"),
        ),
        patch("sparse_lora_dist.model.model.Model.load", side_effect=MemoryError),
        redirect_stdout(out),
    ):
        try:
            train.run(config=load_config(flags))
        except MemoryError:
            return out.getvalue()
    raise AssertionError("it did not die")
