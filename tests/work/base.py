"""What workers run for ``test_base_model.py``: loading, with everything counted that comes in."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear, QuantLinear
from sparse_lora_dist.base_model.nf4_shard import own_weights, quantized_parameters
from sparse_lora_dist.base_model.quant_experts import Matrix
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.shard_loader import LoadReport, ShardLoader
from sparse_lora_dist.base_model.weight_map import find_keys, find_sources
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import ModelConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Method
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.zero3.engine import Engine
from sparse_lora_dist.zero3.parameters import ShardBuilder, gathered

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def config_of(**model: Any) -> Config:
    """The defaults, but for the base model."""
    return Config(model=ModelConfig(**model))


def engine_config_of(config: Config, **zero: Any) -> dict[str, Any]:
    """ds_configs/zero3.json's essentials, with other ``zero_optimization`` keys."""
    stage3 = {"stage": 3, "stage3_param_persistence_threshold": 0} | zero
    return engine_dict({"zero_optimization": stage3}, config, comm.world_size())


def small_method() -> Method:
    return Method(name="lora")


# Counting what comes in.


class Received(TorchDispatchMode):
    """Every collective of torch.distributed inside, whoever calls it: (operation, bytes that
    arrive)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            arriving = [t for t in tree_leaves(args[0]) if isinstance(t, Tensor)]
            self.calls.append((func.overloadpacket.__name__, sum(t.nbytes for t in arriving)))
        return func(*args, **(kwargs or {}))


@dataclass
class FileReads:
    """Every unbuffered read of a weights file: (file, first byte, bytes)."""

    ranges: list[tuple[str, int, int]] = field(default_factory=list)

    @contextmanager
    def counted(self) -> Iterator[None]:
        reads, usual = self.ranges, Path.open

        class CountingFile(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                start = self.tell()
                got = super().readinto(buffer) or 0
                reads.append((Path(str(self.name)).name, start, got))
                return got

        def counting_open(path: Path, mode: str = "r", buffering: int = -1, **rest: Any) -> Any:
            if path.suffix == ".safetensors" and buffering == 0:
                return CountingFile(str(path))
            return usual(path, mode, buffering, **rest)

        with patch.object(Path, "open", counting_open):
            yield


# (a) One weight.


def quantize_shares(
    shapes: Sequence[tuple[int, int]], sources: Mapping[str, Sequence[str]]
) -> Counter[str]:
    """Quantise every shape from memory, for each clothing from the dtypes in ``sources``, gather it
    and compare with bitsandbytes; what was seen, by kind. Raises where something differs."""
    seen: Counter[str] = Counter()
    for clothing in sources:
        config = config_of(precision=clothing)
        builder = ShardBuilder(engine_config_of(config), DTYPES[clothing])
        for shape in shapes:
            for source in sources[clothing]:
                w_OI = _random(shape, DTYPES[source])
                for double_quant in (False, True):
                    layout = nf4.Layout(shape=shape, double_quant=double_quant)
                    seen["elements read"] += _compare(w_OI, layout, builder)
                    seen["weights"] += w_OI.numel()
                    seen["double" if double_quant else "plain"] += 1
                    seen["nested blocks"] = max(seen["nested blocks"], layout.num_nested)
    return seen


def _random(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    w = torch.randn(shape, generator=generator)
    # Rows of different sizes, so that a block scale taken from the wrong place cannot pass.
    return (w * torch.rand(shape[0], 1, generator=generator).add_(0.01)).to(dtype)


def _compare(w_OI: Tensor, layout: nf4.Layout, builder: ShardBuilder) -> int:
    start, stop = own_weights(layout, builder.dtype)
    packed, scales = quantized_parameters(w_OI.flatten()[start:stop].clone(), layout, builder)
    fair = -(-layout.numel // comm.world_size())
    assert stop - start <= fair + 2 * nf4.BLOCK, (tuple(w_OI.shape), stop - start, fair)
    for parameter in (packed, scales):
        assert parameter.numel() == 0 and parameter.dtype == builder.dtype
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // comm.world_size())
    layer = QuantLinear(layout, (packed, scales), None)
    with gathered([packed, scales]):
        compare_with_bitsandbytes(layer, w_OI)
    return stop - start


def compare_with_bitsandbytes(layer: QuantLinear | Matrix, w_OI: Tensor) -> None:
    """A gathered layer, or one expert's matrix, against bitsandbytes' own quantisation of the whole
    weight, bit for bit."""
    layout, what = layer.layout, (tuple(w_OI.shape), w_OI.dtype, layer.layout.double_quant)
    theirs, state = bnb.quantize_4bit(
        w_OI, blocksize=64, quant_type="nf4", compress_statistics=layout.double_quant
    )
    weight, index = (layer.packed, layer.index) if isinstance(layer, Matrix) else (layer.weight, 0)
    packed = weight.data.view(torch.uint8).narrow(
        0, index * layout.matrix_bytes, layout.matrix_bytes
    )
    assert torch.equal(packed, theirs.flatten()), f"packed bytes differ: {what}"

    scales = layer.scales.data.clone().view(torch.uint8)[: layout.scale_bytes]
    if layout.double_quant:
        count = layout.count
        parts = scales.split([4 * layout.num_nested, 4 * count, layout.num_blocks])
        nested, offset, absmax = (part.view(count, -1)[index] for part in parts)
        assert _same_bits(nested, state.state2.absmax), f"nested absmax differ: {what}"
        assert _same_bits(offset, state.offset.reshape(1)), f"offsets differ: {what}"
        assert _same_bits(absmax, state.absmax), f"quantised absmax differ: {what}"
    else:
        assert _same_bits(scales, state.absmax), f"absmax differ: {what}"

    for dtype in (torch.bfloat16, torch.float32):
        state.dtype = dtype
        assert torch.equal(layer.weight_OI(dtype), bnb.dequantize_4bit(theirs, state)), what


def _same_bits(raw: Tensor, theirs: Tensor) -> bool:
    return torch.equal(raw, theirs.contiguous().view(torch.uint8))


# (a, b) A whole model from files.


@dataclass
class Loaded:
    """What one rank saw while it loaded a model."""

    report: LoadReport
    reads: list[tuple[str, int, int]]
    received: list[tuple[str, int]]
    num_quantized: int
    num_weights: int
    """Of the quantised linears."""


def load_and_compare(folder: str, precision: str, double_quant: bool) -> Loaded:
    """Load with everything counted, then compare each linear with bitsandbytes."""
    config = config_of(model=folder, precision=precision, double_quant=double_quant)
    reads, received = FileReads(), Received()
    reports: list[LoadReport] = []
    usual = ShardLoader.load

    def counted_load(loader: ShardLoader, *args: Any, **kwargs: Any) -> None:
        with reads.counted(), received:
            usual(loader, *args, **kwargs)
        reports.append(loader.report)

    with patch.object(ShardLoader, "load", counted_load):
        model = load_model(config)
    whole = whole_weights(folder)
    linears = quantized_linears(model)
    for name, layer in linears.items():
        with gathered([layer.weight, layer.scales]):
            compare_with_bitsandbytes(layer, whole[f"{name}.weight"])
    return Loaded(
        report=reports[0],
        reads=reads.ranges,
        received=received.calls,
        num_quantized=len(linears),
        num_weights=sum(layer.layout.numel for layer in linears.values()),
    )


def load_model(config: Config, **zero: Any) -> Model:
    model = Model.open(config)
    model.load(config, small_method(), engine_config_of(config, **zero))
    return model


def quantized_linears(model: Model) -> dict[str, QuantLinear]:
    """By the name that the weight has in the file."""
    modules = model.module.named_modules()
    return {n.removesuffix(".base"): m for n, m in modules if isinstance(m, QuantLinear)}


def whole_weights(folder: str) -> dict[str, Tensor]:
    files = Path(folder).glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# (c) Unquantised.


def logits_of_both(folder: str, precision: str) -> dict[str, Any]:
    """Logits of the sharded model and of ``from_pretrained``; elements of its embedding that this
    rank holds."""
    config = config_of(model=folder, precision=precision, quantization="none")
    model = load_model(config)
    assert not quantized_linears(model)
    assert any(isinstance(m, FrozenLinear) for m in model.module.modules())
    optimizer = SparseAdamW(model.trainable(), lr=0.0, weight_decay=0.0)
    engine = Engine(model.module, optimizer, engine_config_of(config))
    tokens = torch.randint(0, 101, (2, 23), generator=torch.Generator().manual_seed(5))
    embedding = model.module.get_input_embeddings().weight
    with engine.evaluating():
        ours = engine(input_ids=tokens, use_cache=False).logits
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    with torch.no_grad():
        theirs = reference(input_ids=tokens, use_cache=False).logits
    return {
        "equal": torch.equal(ours, theirs),
        "distance": (ours - theirs).abs().max().item(),
        # A single rank keeps it gathered, and has no share beside it.
        "held": embedding.numel() + (embedding.ds_tensor.numel() if comm.world_size() > 1 else 0),
        "whole": 101 * embedding.shape[-1] if comm.world_size() == 1 else embedding.ds_numel,
        "tied": model.module.get_output_embeddings().weight is embedding,
    }


# (d) Bad files.


def opening_error(folder: str) -> tuple[str, str, int]:
    """(kind, message, weight bytes read) of opening a model folder."""
    reads = FileReads()
    try:
        with reads.counted():
            Model.open(config_of(model=folder))
    except UserError as error:
        return "UserError", str(error), sum(n for _, _, n in reads.ranges)
    except Exception as error:
        return type(error).__name__, str(error), sum(n for _, _, n in reads.ranges)
    return "none", "", sum(n for _, _, n in reads.ranges)


def opening_error_of(folders: list[str]) -> tuple[str, str, int]:
    """The same where each rank sees its own folder."""
    return opening_error(folders[comm.rank()])


def opening_error_of_nodes(folders: list[str]) -> tuple[str, str, int]:
    """The same where each rank is a node of its own."""
    with patch.object(comm, "is_first_on_its_node", lambda: True):
        return opening_error_of(folders)


def load_odd_module(folder: str) -> dict[str, Any]:
    """A module with what is neither a plain linear nor a norm: a router's bias, a 3-D weight.

    {"bias": the buffer after loading, "unquantized": the report's}
    """
    generator = torch.Generator().manual_seed(0)
    saved = {
        "router.weight": torch.randn(8, 64, generator=generator),
        "bias": torch.randn(8, generator=generator),
        "experts": torch.randn(2, 8, 64, generator=generator),
        "forgotten": torch.ones(3),
    }
    model = nn.Module()
    with torch.device("meta"):
        model.router = nn.Linear(64, 8, bias=False)
        model.experts = nn.Parameter(torch.empty(2, 8, 64))
    model.register_buffer("bias", torch.zeros(8))
    model.register_buffer("forgotten", torch.zeros(3), persistent=False)
    if comm.rank() == 0:
        save_file(saved, Path(folder) / "model.safetensors")
    comm.barrier()
    config = config_of()
    builder = ShardBuilder(engine_config_of(config), torch.bfloat16)
    files = CheckpointFiles(Path(folder))
    sources = find_sources(model, files, find_keys(model, files))
    loader = ShardLoader(files, sources, builder, quantize=True, double_quant=True, initial={})
    loader.load(model, keep=set(), train={})
    return {
        "bias": torch.equal(model.bias, saved["bias"]),
        "forgotten": model.forgotten.tolist(),
        "unquantized": loader.report.unquantized,
    }
