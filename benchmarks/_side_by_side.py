"""Several methods in the same ranks: a random Llama and an engine for each method."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from sparse_lora_dist.data import Batch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods import METHODS, Method, RunContext
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.optim.learning_rate import LearningRate
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.sparsity.decisions import Decisions
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.sparsity.sites import Sites
from sparse_lora_dist.tasks.causal_lm import batch_loss
from sparse_lora_dist.training.step import train_step
from sparse_lora_dist.zero3.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
ZERO3 = str(ROOT / "ds_configs" / "zero3.json")
RATE = TrainConfig().learning_rate


@dataclass
class Run:
    """A method's engine and what belongs to it."""

    engine: Engine
    shards: Shards
    decisions: Decisions
    row_seeds: RowSeeds
    rate: LearningRate
    rows: int
    tokens: int
    documents: int = 1
    """Documents packed into a row."""

    def step(self, step: int) -> float:
        """Optimizer step ``step``, on random rows; its loss. Collective."""
        self.engine.set_learning_rate(lambda born: self.rate.at(step, born))
        batches = [random_rows(step, self.rows, self.tokens, self.documents)]
        result = train_step(
            self.engine,
            self.shards,
            self.decisions,
            batches,
            self.row_seeds,
            step=step,
            loss_of=batch_loss,
        )
        return result.loss


def build(
    name: str,
    options: Mapping[str, Any],
    *,
    folder: str,
    steps: int,
    tokens: int,
    rows: int = 1,
    bits: Any = 32,
    rank: int = 16,
    ds_config: Any = ZERO3,
    **base: Any,
) -> Run:
    """What ``train.run`` puts together before its loop; ``base``: of ModelConfig. Collective."""
    factory = METHODS[name]
    config = Config(
        model=ModelConfig(model=folder, **base),
        data=DataConfig(sequence_length=tokens),
        adapter=AdapterConfig(method=name, rank=rank),
        train=TrainConfig(
            max_steps=steps, micro_batch_size=rows, learning_rate=RATE, moment_bits=bits
        ),
        method_options=factory.options(**options),
    )
    engine_config = engine_dict(ds_config, config, comm.world_size())
    model = Model.open(config)
    plan = RunContext(
        total_steps=steps, warmup_steps=0, learning_rate=RATE, sites=tuple(model.sites)
    )
    method = factory.build(config.method_options, plan)
    row_seeds = model.load(config, method, engine_config)
    optimizer = SparseAdamW(model.param_groups(0.0), lr=RATE, weight_decay=0.0, eight_bit=bits == 8)
    engine = Engine(model.module, optimizer, engine_config)
    sites = Sites(model.adapters, method)
    shards = Shards(engine, optimizer, method, sparse=sites.tensors(), sites=sites)
    rate = _learning_rate(method, steps)
    return Run(engine, shards, Decisions(shards), row_seeds, rate, rows, tokens)


def _learning_rate(method: Method, steps: int) -> LearningRate:
    return LearningRate(
        name="cosine",
        peak=RATE,
        warmup_steps=0,
        stages=method.stages or (steps,),
        newborn_warmup=method.newborn_warmup or 0,
        newborn_restarts=method.newborn_restarts,
    )


def random_rows(step: int, rows: int, tokens: int, documents: int = 1) -> Batch:
    """The same for every method, another on each rank; documents of a row are equally long."""
    generator = torch.Generator().manual_seed(1000 * step + comm.rank())
    ids = torch.randint(0, 500, (rows, tokens), generator=generator)
    return Batch(
        input_ids_MT=ids,
        labels_MT=ids,
        position_ids_MT=torch.arange(tokens // documents).repeat(rows, documents),
        rows_M=tuple(range(rows * comm.rank(), rows * comm.rank() + rows)),
        lengths_M=(tokens,) * rows,
    )


def save_llama(folder: str, *, width: int, inner: int, layers: int) -> None:
    """Random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=500,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def on_ranks(script: str, *arguments: str, ranks: int) -> None:
    """The script again, as so many CPU ranks."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        script,
    ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, *command, *arguments], check=True, env=environment)
