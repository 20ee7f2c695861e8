"""``Config`` holds all options of a run and checks those that depend on several sections.

sections.py defines the options, and load.py fills them in.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.sections import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import NoOptions, RunContext


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a training run, by section. Creating one raises ConfigError if the options
    contradict each other."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    method_options: Any = field(default_factory=NoOptions)
    """Options of the method: an instance of ``METHODS[adapter.method].options``."""

    def __post_init__(self) -> None:
        raise_if(self._bad_for_the_task() + self._bad_for_flash_attention())

    @property
    def packs(self) -> bool:
        """True if several documents (tokenised examples) share a row (sequence) of a batch."""
        return self.model.task == "causal_lm" and self.data.packing is not False

    def run_context(self, total_steps: int, sites: tuple[Site, ...]) -> RunContext:
        """Return the facts about the run that its `Method` is built from.

        Args:
            total_steps: Optimizer steps of the run.
            sites: Linears that carry an adapter, in the order of the model.
        """
        return RunContext(
            total_steps=total_steps,
            warmup_steps=self.train.warmup_steps,
            learning_rate=self.train.learning_rate,
            sites=sites,
        )

    def _bad_for_the_task(self) -> list[str]:
        if self.model.task == "seq_cls" and self.data.packing:
            return [
                "--packing is true, but with --task seq_cls a row holds one example with its "
                "label. Leave --packing out"
            ]
        if self.model.task == "causal_lm" and self.data.text_pair_field is not None:
            return [
                "--text_pair_field belongs to --task seq_cls, but --task is causal_lm. Set --task "
                "seq_cls, or leave --text_pair_field out"
            ]
        return []

    def _bad_for_flash_attention(self) -> list[str]:
        flash = "flash" in (self.model.attn_implementation or "")
        # transformers derives documents from restarting positions only if the batch has one row;
        # with more rows it would silently attend across documents.
        if not (flash and self.packs and self.train.micro_batch_size > 1):
            return []
        return [
            f"--attn_implementation {self.model.attn_implementation} separates packed documents "
            "only if a micro-batch has one row, but --micro_batch_size is "
            f"{self.train.micro_batch_size}. Use --micro_batch_size 1 with a larger "
            "--sequence_length, --attn_implementation sdpa, or --packing false"
        ]

    def as_flat_dict(self) -> dict[str, object]:
        """Return {option: value} of all sections and of the method.

        Written as YAML, it is a ``--config`` file that gives an equal Config.
        """
        parts = (self.model, self.data, self.adapter, self.train, self.run, self.method_options)
        flat = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
        # YAML has lists, but no tuples.
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "adapter": AdapterConfig,
    "train": TrainConfig,
    "run": RunConfig,
}
"""{attribute of ``Config``: dataclass of the section}. The options of the method are not among
them."""
