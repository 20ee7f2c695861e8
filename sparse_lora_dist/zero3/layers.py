"""Let ZeRO-3 gather the parameters of a whole layer at once.

By default DeepSpeed has hooks on every module: each linear gathers its own few tensors when it
runs, and releases them afterwards. With two modules a linear (the frozen one and its adapter) that
is more Python than the arithmetic of a GPU takes. Here a layer of the model is what DeepSpeed calls
a leaf module: one hook gathers all that is in it, one releases it. With gradient checkpointing it
is then gathered twice a micro-batch instead of three times, since the hooks are outside of what
runs again.
"""

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.zero import stage3
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from sparse_lora_dist.zero3.parameters import is_of_base


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's layers, such as ("model.layers", ModuleList).

    These are the ModuleList with most parameters. A model that has no ModuleList gives ("", empty
    ModuleList).
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return "", nn.ModuleList()
    return max(lists, key=lambda item: sum(map(_numel, item[1].parameters())))


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # a shard of it may be here


def gather_by_layer(model: nn.Module, engine_config: Mapping[str, Any]) -> None:
    """Mark the model's layers, before DeepSpeed sets its hooks. Not collective.

    Parameters on NVMe are left alone: a layer has more tensors than DeepSpeed has buffers.

    Args:
        model: a model whose parameters are sharded.
        engine_config: the DeepSpeed configuration, as a dict of its JSON form.
    """
    param = engine_config["zero_optimization"].get("offload_param") or {}
    if param.get("device") == "nvme":
        return
    # Where only adapters are sharded (``zero3.whole``), all of them are gathered at once.
    moves_base = any(is_of_base(parameter) for parameter in model.parameters())
    for module in layers_of(model)[1] if moves_base else [model]:
        set_z3_leaf_module(module, True)
    # DeepSpeed reduces the gradients of a leaf module when the gradient of its input is known, and
    # takes those that are missing as zero. The input of the first layer has no gradient, so there
    # it would reduce zeros, before any gradient is computed. Each is reduced as it comes instead.
    stage3.z3_leaf_parameter = _belongs_to_no_leaf


def _belongs_to_no_leaf(parameter: nn.Parameter) -> bool:
    return False
