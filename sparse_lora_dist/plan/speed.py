"""Traffic and time of a step and of loading, from rates that the user states.

Shapes: N ranks, P weights of linears, M rows, T tokens of a row.
"""

from dataclasses import dataclass
from math import gcd

from transformers import PreTrainedConfig

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.plan.memory import saved_bytes
from sparse_lora_dist.plan.plan_options import PlanConfig
from sparse_lora_dist.plan.playback.meta_step import layers_of
from sparse_lora_dist.plan.playback.parameters import PlannedParameter, ties
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of one optimizer step, unless said otherwise. Bytes, FLOP and seconds."""

    gathered_bytes: int
    """Received by a rank while weights are gathered: the frozen base."""
    gathered_adapter_bytes: int
    """The same of adapters."""
    reduced_bytes: int
    """Received while gradients are reduced and scattered."""
    across_nodes_bytes: int
    """Of these, what has to come into a node from others."""
    read_bytes: int
    """Read from disk (NVMe) by a rank, for every use of its share of the base."""
    flop: float
    """Of a rank."""
    compute_s: float
    network_s: float
    read_s: float
    tokens: int
    """Of all ranks."""
    file_bytes: int
    """Of the checkpoint that the base is loaded from."""
    load_s: float
    """To read it, every machine its ranks' part."""
    checkpoint_bytes: int
    """That a run saves, all ranks together."""

    @property
    def step_s(self) -> tuple[float, float]:
        """If all traffic hides behind arithmetic, and if none does."""
        parts = self.compute_s, self.network_s, self.read_s
        return max(parts), sum(parts)


def speed_of(shapes: Shapes, engine: PlannedEngine, ranks: Ranks, plan: PlanConfig) -> Speed:
    """Of the job at the rates of ``plan``."""
    train, count = shapes.config.train, ranks.world_size
    micro = train.gradient_accumulation_steps
    gathered = shapes.gathered(engine.bounds)
    others = (count - 1) / count
    # Each use of the frozen base gathers it: from all ranks, or (hpZ) from those with one copy.
    group = engine.hpz if engine.hpz > 1 else count
    base = gathered.received * shapes.itemsize * micro
    frozen = base * (group - 1) / group
    read = base / count if engine.parameters == "nvme" else 0
    adapter = gathered.received_trained * shapes.itemsize * others * micro
    trained = sum(p.numel for p in shapes.parameters if p.kind == "trained")
    reduced = 4 * trained * others * micro
    # What has to enter a node: of the base nothing, where a whole group lies in it.
    foreign = (1 - 1 / ranks.nodes) / others if count > 1 else 0.0
    across = (adapter + reduced) * foreign
    across += base * (1 - gcd(ranks.per_node, group) / group)
    flop = step_flop(shapes) * micro
    file_bytes = sum(p.file_bytes for p in shapes.parameters)
    return Speed(
        gathered_bytes=int(frozen),
        gathered_adapter_bytes=int(adapter),
        reduced_bytes=int(reduced),
        across_nodes_bytes=int(across),
        read_bytes=int(read),
        flop=flop,
        compute_s=flop / (plan.tflops * 1e12),
        network_s=(frozen + adapter + reduced) / (plan.network_gb_per_s * 1e9),
        read_s=read * ranks.per_node / (plan.disk_gb_per_s * 1e9),
        tokens=train.micro_batch_size * micro * count * shapes.config.data.sequence_length,
        file_bytes=file_bytes,
        load_s=file_bytes / ranks.nodes / (plan.disk_gb_per_s * 1e9),
        checkpoint_bytes=saved_bytes(shapes, Ranks(world_size=1)),
    )


def step_flop(shapes: Shapes) -> float:
    """FLOP of a micro-batch on a rank.

    Forward 2 P a token, backward 2 P (a frozen weight has no gradient), 2 P again in each layer
    that is run again; adapters 2, 2 for their second forward and 4; attention 4 M T^2 width a
    layer and pass, and 2.5 times that in backward, as if every row were one document.
    """
    config = shapes.config
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    name, layers = layers_of(shapes.model)
    again = 1 if config.model.gradient_checkpointing else 0
    weights = {True: 0.0, False: 0.0}
    for parameter in shapes.parameters:
        if parameter.kind in ("packed", "plain"):
            active = active_fraction(parameter, shapes.model.config)
            weights[parameter.module.startswith(f"{name}.")] += active * parameter.in_file
    sizes, head = {p.name: p.numel for p in shapes.parameters}, output_head(shapes.model)
    weights[False] += sum(sizes[tied] for module, tied in ties(shapes.model) if module == head)
    linear = 2 * ((2 + again) * weights[True] + 2 * weights[False])
    trained = sum(p.numel for p in shapes.parameters if p.kind == "trained")
    attention = 4 * rows * length**2 * attention_width(shapes.model.config) * len(layers)
    return rows * length * (linear + 2 * (4 + again) * trained) + (3.5 + again) * attention


def active_fraction(parameter: PlannedParameter, config: PreTrainedConfig) -> float:
    """Of a weight that a token meets: all, or its experts'."""
    if not parameter.module.endswith("experts"):
        return 1.0
    text = config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(text, name, None):
            return float(text.num_experts_per_tok) / float(count)
    return 1.0


def attention_width(config: PreTrainedConfig) -> int:
    """Numbers in the queries of a token."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    each = getattr(text, "head_dim", None)
    return int(heads * each) if heads and each else int(getattr(text, "hidden_size", 0))
