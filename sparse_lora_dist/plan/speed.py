"""Traffic and time of an optimizer step and of loading the base, computed from the rates of GPU,
network and disk that the user gives."""

from dataclasses import dataclass
from math import gcd

from transformers import PreTrainedConfig

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.config.sections import VARLEN
from sparse_lora_dist.plan.memory import saved_bytes
from sparse_lora_dist.plan.plan_options import PlanConfig
from sparse_lora_dist.plan.playback.parameters import PlannedParameter, ties
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes
from sparse_lora_dist.zero3.layers import layers_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Traffic and time of a run: per optimizer step, and for loading and saving. All micro-batches
    of a step are counted together."""

    gathered_bytes: int
    """Bytes of the frozen base that a rank receives in all-gathers, per step."""
    gathered_adapter_bytes: int
    """Bytes of trained parameters that a rank receives in all-gathers, per step."""
    reduced_bytes: int
    """Bytes of gradients that a rank receives in reduce-scatters, per step."""
    across_nodes_bytes: int
    """Bytes of base, adapters and gradients that come into one node from other nodes, per step."""
    read_bytes: int
    """Bytes of its shard of the base that a rank reads from NVMe, per step."""
    flop: float
    """Number of floating-point operations of a rank, per step."""
    compute_s: float | None
    """Seconds of computing on a rank, per step; None if its rate is not known."""
    network_s: float
    """Seconds of network traffic, per step."""
    read_s: float
    """Seconds of reading shards from NVMe, per step."""
    tokens: int
    """Number of tokens of all ranks together, per step."""
    file_bytes: int
    """Bytes that are read from the base files (the model's safetensors files)."""
    load_s: float
    """Seconds to read the base files, if every machine reads an equal part of them."""
    checkpoint_bytes: int
    """Bytes of a checkpoint of the run, summed over ranks."""

    @property
    def step_s(self) -> tuple[float, float] | None:
        """Seconds of a step, as the pair (if network and disk traffic fully overlap with compute,
        if nothing overlaps); None if the time of computing is not known."""
        if self.compute_s is None:
            return None
        parts = self.compute_s, self.network_s, self.read_s
        return max(parts), sum(parts)


def speed_of(shapes: Shapes, engine: PlannedEngine, ranks: Ranks, plan: PlanConfig) -> Speed:
    """Return the traffic and time of a run.

    Args:
        shapes: the model, its adapters and the options of the run.
        engine: the memory settings of the engine file, which is the DeepSpeed JSON file.
        ranks: number of ranks and of machines, and whether the ranks have GPUs.
        plan: the planner's options, which give the rates of GPU, network and disk.

    Returns:
        Bytes and seconds, most of them per optimizer step on one rank.
    """
    train, count = shapes.config.train, ranks.world_size
    micro = train.gradient_accumulation_steps
    gathered = shapes.gathered(engine.bounds)
    others = (count - 1) / count
    # Each use of the frozen base gathers it from all ranks or, with hpZ, from those of one copy.
    group = engine.hpz if engine.hpz > 1 else count
    base = gathered.received * shapes.itemsize * micro
    frozen = base * (group - 1) / group
    read = base / count if engine.parameters == "nvme" else 0
    adapter = gathered.received_trained * shapes.itemsize * others * micro
    trained = sum(p.numel for p in shapes.parameters if p.kind == "trained")
    reduced = 4 * trained * others * micro
    # If a whole hpZ group is in one node, nothing of the base has to enter the node.
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
        compute_s=None if plan.rate is None else flop / (plan.rate * 1e12),
        network_s=(frozen + adapter + reduced) / (plan.network_gb_per_s * 1e9),
        read_s=read * ranks.per_node / (plan.disk_gb_per_s * 1e9),
        tokens=train.micro_batch_size * micro * count * shapes.config.data.sequence_length,
        file_bytes=file_bytes,
        load_s=file_bytes / ranks.nodes / (plan.disk_gb_per_s * 1e9),
        checkpoint_bytes=saved_bytes(shapes, Ranks(world_size=1)),
    )


def step_flop(shapes: Shapes) -> float:
    """Return the number of floating-point operations of one micro-batch on one rank.

    Operations per token and entry of a weight:

    - a frozen weight: 2 in forward and 2 in backward, as it has no gradient of its own; 2 more in
      layers that gradient checkpointing runs again;
    - an adapter entry: 2 in forward, 4 in backward, 2 for computing the adapter's output again in
      backward; 2 more with gradient checkpointing.

    Attention costs 4 x rows x length^2 x width operations per layer in forward, and 2.5 times that
    in backward. length is the number of tokens of a row, counted as one document; width is that of
    the queries of all heads together. The attention for packed documents leaves out the tokens
    after each token, which are half.
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
    each = 2 if shapes.model.config.get_text_config()._attn_implementation == VARLEN else 4
    attention = each * rows * length**2 * attention_width(shapes.model.config) * len(layers)
    return rows * length * (linear + 2 * (4 + again) * trained) + (3.5 + again) * attention


def active_fraction(parameter: PlannedParameter, config: PreTrainedConfig) -> float:
    """Return the fraction of a weight that one token uses.

    Args:
        parameter: the weight.
        config: the model's config, which has the number of experts and of experts per token.

    Returns:
        The number of experts per token over the number of experts if the weight holds the experts
        of a layer, else 1.
    """
    if not parameter.module.endswith("experts"):
        return 1.0
    text = config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(text, name, None):
            return float(text.num_experts_per_tok) / float(count)
    return 1.0


def attention_width(config: PreTrainedConfig) -> int:
    """Return the number of entries of a token's queries, all heads together.

    If the config has no num_attention_heads or no head_dim, return hidden_size, or 0 if the config
    has no hidden_size either.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    each = getattr(text, "head_dim", None)
    return int(heads * each) if heads and each else int(getattr(text, "hidden_size", 0))
