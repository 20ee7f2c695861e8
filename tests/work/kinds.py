"""What workers run for ``test_checkpoint_kinds.py``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparse_lora_dist.base_model.quant_experts import QuantExperts
from sparse_lora_dist.base_model.weight_map import Packed
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.zero3.engine import Engine
from sparse_lora_dist.zero3.parameters import gathered
from tests.work.base import (
    compare_with_bitsandbytes,
    config_of,
    engine_config_of,
    load_model,
    quantized_linears,
    whole_weights,
)

TOKENS = torch.randint(0, 101, (2, 23), generator=torch.Generator().manual_seed(5))


def packed_like_the_files(folder: str) -> dict[str, Any]:
    """A checkpoint that came quantised: are gathered bytes those of the files, and logits those of
    transformers?"""
    model = load_model(config_of(model=folder))
    whole = whole_weights(folder)
    linears = quantized_linears(model)
    for name, layer in linears.items():
        key, layout = f"{name}.weight", layer.layout
        with gathered([layer.weight, layer.scales]):
            packed = layer.weight.data.view(torch.uint8)[: layout.packed_bytes].clone()
            scales = layer.scales.data.view(torch.uint8)[: layout.scale_bytes].clone()
        assert torch.equal(packed, whole[key].flatten().view(torch.uint8)), key
        assert scales.tolist() == _scales_in_files(whole, key).tolist(), key
    logits = logits_of(model, "bf16")
    return {
        "linears": len(linears),
        "kinds": {(m.layout.quant_type, m.layout.block) for m in linears.values()},
        "equal": torch.equal(logits, _logits_of_transformers(folder)),
        "logits": logits,
    }


def _scales_in_files(whole: dict[str, Tensor], key: str) -> Tensor:
    absmax = whole[f"{key}.absmax"].view(torch.uint8)
    if f"{key}.nested_absmax" not in whole:
        return absmax
    state = next(t for k, t in whole.items() if k.startswith(f"{key}.quant_state"))
    offset = torch.tensor(json.loads(bytes(state.numpy()))["nested_offset"])
    nested = whole[f"{key}.nested_absmax"]
    return torch.cat([nested.view(torch.uint8), offset.reshape(1).view(torch.uint8), absmax])


def logits_of(model: Model, precision: Any) -> Tensor:
    """What the engine says to ``TOKENS``."""
    optimizer = SparseAdamW(model.trainable(), lr=0.0, weight_decay=0.0)
    config = config_of(precision=precision)
    engine = Engine(model.module, optimizer, engine_config_of(config))
    with engine.evaluating():
        return engine(input_ids=TOKENS, use_cache=False).logits


def _logits_of_transformers(folder: str) -> Tensor:
    # In training mode: for evaluation bitsandbytes' CPU kernels pack the weights another way.
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
    for parameter in reference.parameters():
        if parameter.is_floating_point():  # in a 4-bit model these keep the dtype of the files
            parameter.data = parameter.data.bfloat16()
    return reference(input_ids=TOKENS, use_cache=False).logits.detach()


def opening_error_of(folder: str, **model: Any) -> str:
    """The message with which opening, or loading, a model folder ends."""
    try:
        load_model(config_of(model=folder, **model))
    except UserError as error:
        return str(error)
    return "no error"


def loading_error_with_full(folder: str, full: str) -> str:
    """The same where a module is to be trained in full."""
    config = replace(config_of(model=folder), adapter=AdapterConfig(modules_to_save=(full,)))
    try:
        load_model(config)
    except UserError as error:
        return str(error)
    return "no error"


def quantize_folder(folder: Path, out: Path, *, block: int, quant_type: str, nested: bool) -> None:
    """A checkpoint as bitsandbytes writes it, of block sizes that transformers does not ask for."""
    out.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, w in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = w
            continue
        packed, state = bnb.quantize_4bit(
            w, blocksize=block, quant_type=quant_type, compress_statistics=nested
        )
        tensors[name] = packed
        tensors |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config))


def experts_like_transformers(folder: str, plain: str) -> dict[str, Any]:
    """Experts in 4 bits: their bytes against bitsandbytes', and logits and gradients against
    transformers' own experts with the dequantised weights, which ``plain`` gets."""
    model = load_model(config_of(model=folder, precision="fp32"))
    whole, dequantized = whole_weights(folder), {}
    for name, layer in quantized_linears(model).items():
        with gathered([layer.weight, layer.scales]):
            dequantized[f"{name}.weight"] = layer.weight_OI(torch.float32)
    modules = model.module.named_modules()
    experts = {n: m for n, m in modules if isinstance(m, QuantExperts)}
    for name, module in experts.items():
        with gathered(module.parameters()):
            for leaf, layout in module.layouts.items():
                source = model.sources[f"{name}.{leaf}"]
                assert not isinstance(source, Packed) and len(source.keys) == layout.count
                for index, key in enumerate(source.keys):
                    matrix = module.matrix(leaf, index)
                    compare_with_bitsandbytes(matrix, whole[key])
                    dequantized[key] = matrix.weight_OI(torch.float32)
    if comm.rank() == 0:
        Path(plain).mkdir()
        save_file(whole | dequantized, Path(plain) / "model.safetensors")
        (Path(plain) / "config.json").write_text((Path(folder) / "config.json").read_text())
    comm.barrier()
    reference = load_model(config_of(model=plain, precision="fp32", quantization="none"))
    ours, theirs = _trained(model), _trained(reference)
    for name, (loss, grad) in ours.items():
        torch.testing.assert_close(loss, theirs[name][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, theirs[name][1], rtol=1e-4, atol=1e-6)
    return {"experts": len(experts), "matrices": sum(k in dequantized for k in whole)}


def _trained(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensor -> (logits, its gradient's shard) with a B that is not zero."""
    config = config_of(precision="fp32")
    optimizer = SparseAdamW(model.trainable(), lr=0.0, weight_decay=0.0)
    engine = Engine(model.module, optimizer, engine_config_of(config))
    for component in engine.slices:
        engine.master(component).copy_(torch.linspace(-0.1, 0.1, component.length))
    engine.masters_changed()
    logits = engine(input_ids=TOKENS, use_cache=False).logits
    engine.backward(logits.square().mean())
    return {p.name: (logits.detach(), engine.gradient(p)) for p in engine.slices}
