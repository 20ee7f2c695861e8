"""The usual way to train LoRA on a 4-bit base under ZeRO-3: transformers, bitsandbytes, PEFT."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _side_by_side import random_rows  # isort: skip  # sets the path

import torch
from torch import nn

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import DataConfig, ModelConfig, TrainConfig
from sparse_lora_dist.distributed import comm


class Peft:
    """transformers + bitsandbytes + PEFT and torch's AdamW, without DeepSpeed."""

    def __init__(self, model: nn.Module, *, rows: int, tokens: int) -> None:
        self.model = model.train()
        self.rows, self.tokens = rows, tokens
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.device = trained[0].device
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=fused)

    def step(self, step: int) -> float:
        """Make one optimizer step on the rows that the other ways get, and return its loss."""
        ids = random_rows(step, self.rows, self.tokens).input_ids_MT.to(self.device)
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


@dataclass
class Usual:
    """Its engine, and the rows it steps on."""

    engine: Any
    tokens: int

    def step(self, step: int) -> float:
        """On the same random rows as ours; the loss. Collective."""
        ids = random_rows(step, 1, self.tokens).input_ids_MT.to(self.engine.device)
        loss = self.engine(input_ids=ids, labels=ids, use_cache=False).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(comm.sum_over_ranks(loss.detach().float())) / comm.world_size()


def build_usual(
    *,
    folder: str,
    tokens: int,
    ds_config: Any,
    precision: Any,
    gradient_checkpointing: bool,
    rank: int,
    steps: int,
    peaks: dict[str, int] | None,
    peak: Callable[[], int],
) -> Usual:
    """transformers quantises the whole model on every rank, PEFT wraps it, DeepSpeed cuts it, with
    the engine settings that our run has. Collective."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = Config(
        model=ModelConfig(model=folder, precision=precision),
        data=DataConfig(sequence_length=tokens),
        train=TrainConfig(max_steps=steps, micro_batch_size=1),
    )
    engine_config = engine_dict(ds_config, config, comm.world_size())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    alive_for_transformers = HfDeepSpeedConfig(engine_config)
    model = quantised_peft(
        folder,
        dtype=dtype,
        rank=rank,
        gradient_checkpointing=gradient_checkpointing,
        peaks=peaks,
        peak=peak,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=engine_config, dist_init_required=False
    )
    engine.train()
    unset_hf_deepspeed_config()
    del alive_for_transformers
    gc.collect()
    return Usual(engine, tokens)


def quantised_peft(
    folder: str,
    *,
    dtype: torch.dtype,
    rank: int,
    gradient_checkpointing: bool,
    peaks: dict[str, int] | None = None,
    peak: Callable[[], int] = lambda: 0,
) -> Any:
    """The base quantised by transformers, with a LoRA of PEFT on all its linears."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        ),
    )
    if peaks is not None:
        peaks["loading"] = peak()
    return with_lora(model, dtype=dtype, rank=rank, gradient_checkpointing=gradient_checkpointing)


def with_lora(
    model: Any, *, dtype: torch.dtype, rank: int, gradient_checkpointing: bool
) -> nn.Module:
    """A quantised model with a LoRA of PEFT, in the same dtype, on all its linears."""
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model
