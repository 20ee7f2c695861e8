"""Options of launcher/plan.py: those of a training run, and the planner's own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.checks import at_least, raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import load, world_problems
from sparse_lora_dist.config.load import read_options
from sparse_lora_dist.config.paths import expanded
from sparse_lora_dist.config.schema import Program
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.system.small_files import is_pipe

COMMON = """
    model quantization gradient_checkpointing sequence_length method rank target_modules
    modules_to_save max_steps micro_batch_size moment_bits ds_config
""".split()
"""Options of a training run that change the memory most, which ``--help`` shows."""
SIZE = re.compile(
    r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*(B|MB|GB|TB|MiB|GiB|TiB)?\s*", re.IGNORECASE
)
"""Memory size: a number with or without a unit."""
UNITS = {"": 1e9, "b": 1, "mb": 1e6, "gb": 1e9, "tb": 1e12}
"""Decimal unit in lower case -> bytes; a number without a unit is in GB."""
BINARY_UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40}
"""Binary unit in lower case -> bytes."""
LEAST_RATE = 0.001
"""Smallest rate of a disk, GPU or network; times of slower ones are no numbers of use."""
MOST_MEMORY = 10**15
"""Bytes of the largest memory that is planned: more is a number whose unit was forgotten."""
MAX_PER_NODE = 1024
"""Largest number of ranks of one machine: each number up to that of the run is planned."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Planner: hardware that the run is planned for, and output"""

    world_size: int = 8
    """Number of ranks on all nodes together, one per GPU, at least 1."""
    nodes: int = 1
    """Number of machines, at least 1. Must divide world_size."""
    gpu_memory: str = "24GB"
    """Memory of one GPU, e.g. 24GB (10^9 bytes each) or 80GiB (2^30); a number alone is GB. 0: plan
    ranks on CPUs."""
    host_memory: str | None = None
    """Host memory of one machine, e.g. 256GB. null: host memory is not checked."""
    disk_gb_per_s: float = 1.0
    """Read rate of a machine's disk in GB/s (base files, NVMe offload), at least 0.001."""
    tflops: float | None = None
    """Rate in TFLOP/s that one GPU, or one CPU rank, reaches in matmuls of 4-bit weights,
    dequantising included; at least 0.001. Measure it: a data sheet's peak is several times higher.
    null: 100 for a GPU; of CPU ranks no time of a step is given."""
    network_gb_per_s: float = 20.0
    """Rate in GB/s at which one rank receives weights in an all-gather, at least 0.001."""
    whole_logits: bool = False
    """Plan memory for the logits of all tokens at once, not in chunks. Set it if training prints a
    note that it computes them at once, as for a few architectures."""
    json: bool = False
    """Print JSON instead of text."""
    plot: str | None = None
    """PNG file for a plot of GPU memory against the number of ranks. null: no plot."""
    overwrite: bool = False
    """Replace an existing file at --plot."""

    @property
    def rate(self) -> float | None:
        """TFLOP/s of a rank; None for CPU ranks whose rate is not given."""
        return 100.0 if self.tflops is None and self.gpu_bytes > 0 else self.tflops

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "world_size", "nodes")
        problems += at_least(self, LEAST_RATE, "disk_gb_per_s", "tflops", "network_gb_per_s")
        if self.world_size < self.nodes:
            problems.append(
                f"--world_size must be at least --nodes, got {self.world_size} ranks on "
                f"{self.nodes} nodes"
            )
        elif self.nodes >= 1 and self.world_size > MAX_PER_NODE * self.nodes:
            problems.append(
                f"--world_size may be at most {MAX_PER_NODE} on a node, got {self.world_size} on "
                f"{self.nodes}. Raise --nodes"
            )
        for name in ("gpu_memory", "host_memory"):
            text = getattr(self, name)
            if text is not None and bytes_in(text) is None:
                problems.append(f"--{name} must be a size like 24GB or 80GiB, got {text!r}")
            elif text is not None and (bytes_in(text) or 0) > MOST_MEMORY:
                problems.append(
                    f"--{name} may be at most 1000TB, got {text!r}. A number alone is GB: write "
                    "bytes as 24000000000B"
                )
        if self.plot is not None and is_pipe(Path(expanded(self.plot))):
            problems.append(f"--plot {self.plot} is a pipe or device. Name a file")
        elif self.plot is not None and Path(expanded(self.plot)).exists() and not self.overwrite:
            problems.append(f"--plot {self.plot} exists already. Give --overwrite or another name")
        elif self.plot is not None and not Path(expanded(self.plot)).parent.is_dir():
            problems.append(f"--plot {self.plot} is in no folder. Make the folder first")
        raise_if(problems)

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU in bytes; 0 for ranks on CPUs."""
        return bytes_in(self.gpu_memory) or 0

    @property
    def host_bytes(self) -> int | None:
        """Memory of one machine in bytes; None if host memory is not checked."""
        return None if self.host_memory is None else bytes_in(self.host_memory)


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What launcher/plan.py was asked for: the run to plan, and the planner's own options."""

    config: Config
    """All options of the run to plan."""
    plan: PlanConfig
    """The planner's own options."""
    engine: dict[str, Any]
    """Content of the --ds_config file."""

    @property
    def run(self) -> RunConfig:
        """Options of the section ``run``; ``run_program`` reads --debug from it."""
        return self.config.run


PROGRAM = Program(
    name="launcher/plan.py",
    usage="python launcher/plan.py --model FOLDER --world_size 8 --gpu_memory 24GB [--option ...]",
    description="Plan memory, traffic and time of a run from the model's config.json alone.",
    own=PlanConfig,
    trains=False,
    common=tuple(COMMON),
)


def bytes_in(text: str) -> int | None:
    """Return the bytes in a memory size, or None if ``text`` is not a size.

    Args:
        text: a size such as "24GB", "22.5 GiB", or "24", which means GB.
    """
    match = SIZE.fullmatch(text)
    if match is None:
        return None
    unit = (match[2] or "").lower()
    size = float(match[1]) * (UNITS | BINARY_UNITS)[unit]
    return int(size) if isfinite(size) and (size == 0 or size >= 1) else None


def load_request(argv: Sequence[str]) -> PlanRequest:
    """Read the planner's command line, its YAML file (--config) and the engine file (--ds_config).

    Args:
        argv: the words of the command line after the program's name.

    Returns:
        The options of the run, those of the planner, and the content of the engine file.

    Raises:
        ConfigError: if options are wrong, or the engine file does not fit them; it lists all
            problems.
    """
    config, plan = read_options(argv, PROGRAM)
    engine, place = load(config.run.ds_config)
    raise_if(world_problems(engine, config, plan.world_size, place))
    return PlanRequest(config=config, plan=plan, engine=engine)
