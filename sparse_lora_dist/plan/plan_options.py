"""The planner's command line: every option of a run, and a few of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from sparse_lora_dist.config.checks import above, at_least, raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import load, world_problems
from sparse_lora_dist.config.load import read_options
from sparse_lora_dist.config.schema import Program
from sparse_lora_dist.config.sections import RunConfig

SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*(B|MB|GB|TB|MiB|GiB|TiB)?\s*", re.IGNORECASE)
UNITS = {"": 1e9, "b": 1, "mb": 1e6, "gb": 1e9, "tb": 1e12}
BINARY_UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """RunContext: where the run would be, and what is asked. Rates are yours to state"""

    world_size: int = 8
    """GPUs of the job, all nodes together."""
    nodes: int = 1
    """Machines they are spread over, evenly."""
    gpu_memory: str = "24GB"
    """Memory of a GPU; GB is 10^9 bytes, GiB 2^30. 0 plans ranks on CPUs."""
    host_memory: str | None = None
    """Memory of a machine; null leaves it unchecked."""
    disk_gb_per_s: float = 1.0
    """GB/s at which a machine reads the checkpoint, and shares of the base that lie on its disk."""
    tflops: float = 100.0
    """TFLOP/s that a GPU reaches in matmuls, dequantising included: not what its maker says."""
    network_gb_per_s: float = 20.0
    """GB/s that a rank receives from the others while weights are gathered."""
    whole_logits: bool = False
    """RunContext for logits of all tokens at once, which a few architectures need."""
    json: bool = False
    """Print JSON instead of text."""
    plot: str | None = None
    """Also draw bytes of a GPU against the number of ranks into this PNG file."""

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "world_size", "nodes")
        problems += above(self, 0, "disk_gb_per_s", "tflops", "network_gb_per_s")
        if self.nodes >= 1 and self.world_size % self.nodes:
            problems.append(
                f"world_size must be a multiple of nodes, got {self.world_size} on {self.nodes}"
            )
        for name in ("gpu_memory", "host_memory"):
            text = getattr(self, name)
            if text is not None and bytes_in(text) is None:
                problems.append(f"{name} must be a size like 24GB, 80 GiB or 40, got {text!r}")
        raise_if(problems)

    @property
    def gpu_bytes(self) -> int:
        """0 for ranks on CPUs."""
        return bytes_in(self.gpu_memory) or 0

    @property
    def host_bytes(self) -> int | None:
        """None where it is not to be checked."""
        return None if self.host_memory is None else bytes_in(self.host_memory)


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A run, and what is asked about it."""

    config: Config
    plan: PlanConfig
    engine: dict[str, Any]
    """Content of the engine file."""

    @property
    def run(self) -> RunConfig:
        """Where ``run_program`` looks for --debug."""
        return self.config.run


PROGRAM = Program(
    name="launcher/plan.py",
    usage="python launcher/plan.py --model FOLDER --world_size 8 --gpu_memory 24GB [--option ...]",
    description="Will a run fit? Bytes of a rank, traffic and time, from the model's config alone.",
    own=PlanConfig,
    trains=False,
)


def bytes_in(text: str) -> int | None:
    """Bytes of "24GB", "22.5 GiB" or, in GB, "24"; None for what is no size."""
    match = SIZE.fullmatch(text)
    if match is None:
        return None
    unit = (match[2] or "").lower()
    size = float(match[1]) * (UNITS | BINARY_UNITS)[unit]
    return int(size) if isfinite(size) else None


def load_request(argv: Sequence[str]) -> PlanRequest:
    """What ``argv`` (without the program's name) and its YAML file ask.

    Raises:
        ConfigError: with every problem there is.
    """
    config, plan = read_options(argv, PROGRAM)
    engine, place = load(config.run.ds_config)
    raise_if(world_problems(engine, config, plan.world_size, place))
    return PlanRequest(config=config, plan=plan, engine=engine)
