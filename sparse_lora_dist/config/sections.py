"""Every option of a run: a frozen dataclass a concern, unit and meaning under each field.

A class checks its own numbers when it is made and raises one ``ConfigError`` with all of them.
``load.py`` fills the classes; field names are the flags and the keys of the YAML file.
"""

from dataclasses import dataclass
from typing import Literal

from sparse_lora_dist.config.checks import above, at_least, bad_durations, bad_regex, raise_if

TRACKERS = tuple("aim clearml comet_ml dvclive mlflow swanlab tensorboard trackio wandb".split())
"""Names of accelerate's trackers, each also the name of its package for pip and import."""
RESETS = ("optimizer", "schedule", "data")
MAX_SEED = 2**32 - 1  # what numpy's generators take


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base model: what is adapted, and how it is held"""

    model: str = "default"
    """Folder or hub id of the base model; "default" is the tiny one in this repository."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    task: Literal["causal_lm", "seq_cls"] = "causal_lm"
    """What is learned: causal_lm (the next token) or seq_cls (a label for each example)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How linear weights are held: nf4 (4 bits each) or none (the precision's 16 or 32)."""
    double_quant: bool = True
    """Quantise the NF4 block scales too: 4.13 instead of 4.5 bits a weight."""
    base_cache: str | None = None
    """Folder that keeps the 4-bit base, so that later jobs load it faster; null keeps none."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; adapter masters and statistics are fp32 either way."""
    attn_implementation: str | None = None
    """Attention by transformers' name (eager, sdpa, flash_attention_2); null lets it choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: a third more time, far less memory. Usual from 7B on."""

    def __post_init__(self) -> None:
        if self.base_cache is not None and self.quantization == "none":
            raise_if(["base_cache keeps a base in 4 bits: use quantization nf4, or leave it out"])


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: what is learned from"""

    data: str = "default"
    """File, folder or hub id to train on; "default" is a part of GSM8K in this repository."""
    eval_data: str | None = None
    """The same for held-out loss; null is "default" if data is, and otherwise none."""
    text_field: str = "text"
    """Column of plain text."""
    text_pair_field: str | None = None
    """Column of a second text, where seq_cls labels pairs."""
    label_field: str = "label"
    """Column of the label, whole numbers or names, for seq_cls."""
    column_names: tuple[str, ...] = ()
    """Columns of a CSV or TSV file whose first line does not name them."""
    prompt_field: str = "prompt"
    """Column of the prompt. A column called messages holds whole chats."""
    response_field: str = "response"
    """Column of the response."""
    chat_template: str | None = None
    """File with a Jinja chat template; null takes the tokenizer's own."""
    train_on: Literal["response", "all"] = "response"
    """Tokens that count in the loss: the response's only, or all."""
    packing: bool | None = None
    """Put several documents in one row, attention staying within each; null is true, but for
    seq_cls false."""
    sequence_length: int = 512
    """Tokens per row, at least 8."""
    max_samples: int | None = None
    """Use the first so many training examples only; null uses all."""

    def __post_init__(self) -> None:
        raise_if(at_least(self, 8, "sequence_length") + at_least(self, 1, "max_samples"))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Adapter: what trains"""

    method: str = "lora"
    """Name of the method; all of them are listed at the end."""
    rank: int = 16
    """Columns of each low-rank pair (the capacity, for methods that choose ranks), at least 1."""
    alpha: float = 32.0
    """The delta is scaled by alpha / rank; above 0."""
    dropout: float = 0.0
    """Fraction of the adapter's inputs set to zero while training, in [0, 1)."""
    target_modules: tuple[str, ...] | str = "all-linear"
    """Linears to adapt: names (q_proj,v_proj), a regex of the whole module name, or all-linear."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole and saved with the adapter, by name."""
    init_adapter: str | None = None
    """Folder or hub id of a PEFT adapter to go on from."""

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "rank") + above(self, 0, "alpha")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.target_modules:
            problems.append("target_modules is empty: name modules, or say all-linear")
        if isinstance(self.target_modules, str):
            problems += bad_regex("target_modules", self.target_modules)
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training: how long and how fast. A step is an optimizer step."""

    max_steps: int | None = None
    """Steps until the schedules end; null lets num_epochs decide."""
    num_epochs: float = 1.0
    """Passes over the data, when max_steps is null; above 0."""
    stop_after: int | None = None
    """End the program after this step, schedules untouched, to be resumed later."""
    micro_batch_size: int = 4
    """Rows per rank in one forward."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW, above 0."""
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = (
        "cosine"
    )
    """Shape of the learning rate over the run."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, at least 0."""
    adam_beta1: float = 0.9
    """Weight of the past in AdamW's first moment, in [0, 1)."""
    adam_beta2: float = 0.999
    """The same in its second."""
    adam_eps: float = 1e-8
    """What AdamW adds to the root of its second moment, above 0."""
    moment_bits: Literal[32, 8] = 32
    """Bits of each of AdamW's two moments; 8 is bitsandbytes' blockwise quantisation."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    seed: int = 0
    """Seed of the adapter's first values, the order of the data, and dropout."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "stop_after", "micro_batch_size", "gradient_accumulation_steps")
        positive = ("num_epochs", "learning_rate", "adam_eps")
        problems = at_least(self, 1, *counts) + above(self, 0, *positive)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        problems += at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm", "seed")
        for name in ("stop_after", "warmup_steps"):
            value = getattr(self, name)
            if self.max_steps is not None and value is not None and value > self.max_steps:
                problems.append(f"{name} must be at most max_steps ({self.max_steps}), got {value}")
        if self.seed > MAX_SEED:
            problems.append(f"seed must be at most {MAX_SEED}, got {self.seed}")
        if self.warmup_steps > 0 and self.lr_schedule == "constant":
            problems.append("lr_schedule constant has no warm-up: use constant_with_warmup")
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run: engine, output and what is logged"""

    ds_config: str = "ds_configs/zero3.json"
    """DeepSpeed's JSON file: stage, offload, buckets; no training numbers."""
    output_dir: str = "runs/default"
    """Folder for checkpoints, metrics and the adapter; made when it is not there."""
    resume: str = "never"
    """auto (from the newest whole checkpoint in output_dir, if any), never, or its folder."""
    reset: tuple[str, ...] = ()
    """With --resume FOLDER: what begins anew, of optimizer, schedule (and optimizer), data."""
    verify: str | None = None
    """A run's folder: check all of its checkpoints, and train nothing."""
    log_every: int = 1
    """Steps between two lines of metrics."""
    eval_every: int = 50
    """Steps between two held-out losses; 0 is before and after training only."""
    eval_batches: int = 20
    """Global batches per held-out loss, at most."""
    save_every: int = 100
    """Steps between two checkpoints; 0 is at the end only."""
    async_save: bool = True
    """Write checkpoints while training goes on; takes host memory for a copy of what is saved."""
    keep_last: int | None = None
    """Checkpoints that stay, the newest of them; null keeps all."""
    keep_best: bool = True
    """With keep_last: the one of the smallest held-out loss stays too."""
    collective_timeout: str = "10m"
    """How long all ranks may stand still; then the job ends and names who lags. At least 5s."""
    max_bad_steps: int = 10
    """Steps in a row without a finite loss and gradient, all left out, that end the run."""
    time_limit: str | None = None
    """Save and leave with status 75 before the program is so old: 90m, 2h, 1-12:00:00."""
    signal_lead: str | None = None
    """How long before its kill a scheduler signals, like 300s: the run warns if that is short."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, both, or []."""
    debug: bool = False
    """Show tracebacks, and what other libraries print."""

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "log_every", "eval_batches", "keep_last", "max_bad_steps")
        problems += at_least(self, 0, "eval_every", "save_every")
        problems += bad_durations(self, "time_limit", "signal_lead")
        problems += bad_durations(self, "collective_timeout", least_s=5)
        problems += [
            f"reset knows {', '.join(RESETS)}, got {name!r}"
            for name in self.reset
            if name not in RESETS
        ]
        if self.reset and self.resume in ("auto", "never"):
            problems.append(
                f"reset needs --resume with the folder of a checkpoint, got {self.resume}: with "
                "auto, a run that was interrupted would begin anew each time"
            )
        problems += [
            f"trackers must be any of {', '.join(TRACKERS)} ([] for none), got {name!r}"
            for name in self.trackers
            if name not in TRACKERS
        ]
        raise_if(problems)
