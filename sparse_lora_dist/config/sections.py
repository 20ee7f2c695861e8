"""All options of a training run: one frozen dataclass per section.

A field's name is the name of the flag and of the key in the YAML file; the string below the field
is its help text. Each class checks its values when it is created and raises one ``ConfigError``
with all problems.
"""

from dataclasses import dataclass
from typing import Literal

from sparse_lora_dist.config.checks import above, at_least, at_most, bad_durations, raise_if
from sparse_lora_dist.system.patterns import bad_regex

TRACKERS = tuple("aim clearml comet_ml dvclive mlflow swanlab tensorboard trackio wandb".split())
"""Names of accelerate's trackers, each also the name of its package for pip and import."""
VARLEN = "varlen"
"""Value of --attn_implementation for the attention of ``tasks/packed_attention.py``."""
RESETS = ("optimizer", "schedule", "data")
"""Words that --reset takes: the state that a resumed run may discard."""
MOST_ROWS = 2**16
"""Largest --micro_batch_size and --gradient_accumulation_steps. More would only fill memory."""
MOST_STEPS = 1_000_000_000
"""Largest number of steps or epochs of a run: larger ones make numbers that no file or figure
holds."""
MAX_SEED = 2**32 - 1  # what numpy's generators take


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base model"""

    model: str = "default"
    """Base model: local folder or hub id. "default" is the tiny model in this repository."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. null: the hub's default branch."""
    task: Literal["causal_lm", "seq_cls"] = "causal_lm"
    """Training task: causal_lm (predict the next token) or seq_cls (classify each example)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""
    quantization: Literal["nf4", "none"] = "nf4"
    """Storage of the frozen linear weights: nf4 (4 bits each) or none (bf16 or fp32, see
    precision)."""
    double_quant: bool = True
    """Quantise the NF4 block scales as well: 4.13 instead of 4.5 bits per weight."""
    base_cache: str | None = None
    """Folder in which the quantised base model is cached, so that later jobs load it faster. null:
    no cache."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of forward and backward: bf16 or fp32. Adapter master weights are always fp32."""
    attn_implementation: str | None = None
    """Attention: varlen (torch's kernel for packed documents, on a GPU in bf16), or a kernel by its
    transformers name: eager, sdpa, flash_attention_2 ... null: varlen where it can be used,
    elsewhere transformers chooses."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: a third more time, far less memory. Usual from 7B on."""

    @property
    def attention_of_transformers(self) -> str | None:
        """Attention that transformers builds the model with; None: it chooses. ``VARLEN`` is put in
        its place later, once it is known to fit the model."""
        return None if self.attn_implementation == VARLEN else self.attn_implementation

    def __post_init__(self) -> None:
        problems = _bad_kernel(self.attn_implementation)
        if self.base_cache is not None and self.quantization == "none":
            problems.append(
                "--base_cache needs --quantization nf4, got none. Leave --base_cache out"
            )
        raise_if(problems)


def _bad_kernel(name: str | None) -> list[str]:
    """Return a problem with an attention kernel that transformers knows but that cannot train here.

    Flex attention is an operation of higher order, which ``OperationRecorder`` does not take, and
    has no backward on CPUs. Paged kernels are made for serving.
    """
    if name is None or not (name == "flex_attention" or name.startswith("paged|")):
        return []
    return [
        f"--attn_implementation {name} cannot be trained with. Give varlen, eager, sdpa, a "
        "flash_attention_... whose package is installed, or leave it out"
    ]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data"""

    data: str = "default"
    """Training data: file, folder or hub id. "default" is a part of GSM8K in this repository."""
    eval_data: str | None = None
    """Held-out data for the evaluation loss: file, folder or hub id. null: the held-out part of
    GSM8K if data is "default", otherwise no evaluation."""
    text_field: str = "text"
    """Column with plain text."""
    text_pair_field: str | None = None
    """Column with a second text, for seq_cls on pairs of texts. null: single texts."""
    label_field: str = "label"
    """Column with the label, for seq_cls: class numbers or class names."""
    column_names: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV file that has no header line. Empty: the first line
    names them."""
    prompt_field: str = "prompt"
    """Column with the prompt. Renamed, a column messages is not read as chats."""
    response_field: str = "response"
    """Column with the response."""
    chat_template: str | None = None
    """File with a Jinja chat template. null: the tokenizer's own."""
    train_on: Literal["response", "all"] = "response"
    """Tokens that count in the loss: those of the response only, or all."""
    packing: bool | None = None
    """Pack several documents into one row, in which no document sees another. null: true for
    causal_lm, unless the layers of the model would let them see each other; false for seq_cls."""
    sequence_length: int = 512
    """Row length in tokens, from 8 to 16777216. Longer plain texts are cut; longer chats and
    prompts with responses are left out."""
    max_samples: int | None = None
    """Number of training examples to use, from the first on, at least 1. null: all."""

    def __post_init__(self) -> None:
        problems = at_least(self, 8, "sequence_length") + at_least(self, 1, "max_samples")
        raise_if(problems + at_most(self, 2**24, "sequence_length"))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Adapter"""

    method: str = "lora"
    """Adapter method. --help lists them, and --help METHOD shows the options of one."""
    rank: int = 16
    """Adapter rank, at least 1. For methods that choose ranks: the largest rank of a layer."""
    alpha: float = 32.0
    """Adapter scale, above 0: the adapter output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability on adapter inputs, in [0, 1)."""
    target_modules: tuple[str, ...] | str = "all-linear"
    """Linear layers to adapt: names (q_proj,v_proj), a regular expression that matches whole
    module names, or all-linear."""
    modules_to_save: tuple[str, ...] = ()
    """Names of further modules to train in full and save with the adapter, such as lm_head."""
    init_adapter: str | None = None
    """PEFT adapter to start from: folder or hub id. null: a new adapter."""

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "rank") + above(self, 0, "alpha")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"--dropout must be in [0, 1), got {self.dropout}")
        if not self.target_modules:
            problems.append("--target_modules is empty. Name modules, or write all-linear")
        given = self.target_modules
        names = given.split(",") if isinstance(given, str) else given
        if given != "all-linear" and "all-linear" in names:
            problems.append(
                "--target_modules must be all-linear alone or names alone, got all-linear in a "
                "list. all-linear names every linear but the output head; write it without a list"
            )
        elif isinstance(given, str):
            problems += bad_regex("--target_modules", given)
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training"""

    max_steps: int | None = None
    """Length of the run in optimizer steps, at least 1. null: num_epochs decides."""
    num_epochs: float = 1.0
    """Passes over the training data, above 0. Used when max_steps is null."""
    stop_after: int | None = None
    """End the job after this optimizer step, at least 1, and leave all schedules unchanged, so
    that the run can be resumed. null: train to the end."""
    micro_batch_size: int = 4
    """Rows per rank in one forward pass, from 1 to 65536."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step, from 1 to 65536."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW, above 0."""
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = (
        "cosine"
    )
    """Shape of the learning rate over the run."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly from 0 to its peak, at least 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW on all trained tensors, norms and biases too, but not on
    sora's gates; at least 0."""
    adam_beta1: float = 0.9
    """Decay rate of AdamW's first moment, in [0, 1)."""
    adam_beta2: float = 0.999
    """Decay rate of AdamW's second moment, in [0, 1)."""
    adam_eps: float = 1e-8
    """Epsilon added to the square root of AdamW's second moment, above 0."""
    moment_bits: Literal[32, 8] = 32
    """Bits per entry of each of AdamW's two moments: 32, or 8 (bitsandbytes' blockwise
    quantisation)."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down, at least 0. 0: no clipping."""
    seed: int = 0
    """Seed of adapter initialisation, data order and dropout, in [0, 4294967295]."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "stop_after", "micro_batch_size", "gradient_accumulation_steps")
        positive = ("num_epochs", "learning_rate", "adam_eps")
        problems = at_least(self, 1, *counts) + above(self, 0, *positive)
        problems += at_most(self, MOST_ROWS, "micro_batch_size", "gradient_accumulation_steps")
        problems += at_most(self, MOST_STEPS, "max_steps", "num_epochs")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        problems += at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm", "seed")
        for name in ("stop_after", "warmup_steps"):
            value = getattr(self, name)
            if self.max_steps is not None and value is not None and value > self.max_steps > 0:
                problems.append(
                    f"--{name} must be at most --max_steps ({self.max_steps}), got {value}"
                )
        if self.seed > MAX_SEED:
            problems.append(f"--seed must be at most {MAX_SEED}, got {self.seed}")
        if self.warmup_steps > 0 and self.lr_schedule == "constant":
            problems.append(
                "--lr_schedule constant has no warm-up, but --warmup_steps is above 0. Use "
                "--lr_schedule constant_with_warmup"
            )
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run: DeepSpeed, output folder, checkpoints and logs"""

    ds_config: str = "zero3"
    """DeepSpeed JSON file, or its name in ds_configs/ (zero3, zero3_offload ...). Options of the
    run set batch size, gradient clipping and precision."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute. auto: on GPUs, or on the CPU of a machine that has none; a GPU that PyTorch
    cannot use is an error."""
    deterministic: bool = False
    """On GPUs, compute with operations that give the same bits each time: slower. On CPUs they
    always do."""
    output_dir: str = "runs/default"
    """Run folder for checkpoints, metrics and the final adapter. Created if missing."""
    resume: str = "never"
    """Checkpoint to resume from: auto (the newest intact one in output_dir, if any), never, or
    the folder of a checkpoint."""
    reset: tuple[str, ...] = ()
    """State to discard when --resume names a folder: any of optimizer, schedule (includes
    optimizer) and data."""
    verify: str | None = None
    """Run folder whose checkpoints are checked; nothing is trained. null: train."""
    log_every: int = 1
    """Optimizer steps between two lines of metrics, at least 1."""
    eval_every: int = 50
    """Optimizer steps between two evaluations, at least 0. 0: only before and after training."""
    eval_batches: int = 20
    """Largest number of global batches per evaluation, at least 1."""
    save_every: int = 100
    """Optimizer steps between two checkpoints, at least 0. 0: only at the end."""
    async_save: bool = True
    """Write checkpoints in the background while training goes on. Takes host memory for a copy of
    the saved state."""
    keep_last: int | None = None
    """Number of newest checkpoints to keep, at least 1. null: keep all."""
    keep_best: bool = True
    """Keep the checkpoint with the smallest evaluation loss too when keep_last is set."""
    collective_timeout: str = "10m"
    """Time without progress on any rank after which the job is aborted and the rank that is
    behind is named, e.g. 90s or 10m; at least 5s."""
    max_bad_steps: int = 10
    """Number of consecutive steps with a non-finite loss or gradient after which the run ends, at
    least 1. Such steps change no weight."""
    time_limit: str | None = None
    """Wall-clock limit of the job, e.g. 90m, 1:30 (90 s) or 1-12:00:00; at least 1s. Saves in time,
    with exit status 75; go on with --resume auto. null: no limit."""
    signal_lead: str | None = None
    """Time between a scheduler's warning signal and its kill, e.g. 300s; at least 1s. A warning is
    printed if that is too short to save. null: no such check."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers that get the metrics besides metrics.jsonl, by accelerate's names, such as
    tensorboard or wandb. []: none."""
    debug: bool = False
    """Show tracebacks and the output of other libraries."""

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "log_every", "eval_batches", "keep_last", "max_bad_steps")
        problems += at_least(self, 0, "eval_every", "save_every")
        problems += bad_durations(self, "time_limit", "signal_lead")
        problems += bad_durations(self, "collective_timeout", least_s=5)
        problems += [
            f"--reset must be any of {', '.join(RESETS)}, got {name!r}"
            for name in self.reset
            if name not in RESETS
        ]
        if self.reset and self.resume in ("auto", "never"):
            problems.append(
                f"--reset needs --resume with the folder of a checkpoint, got {self.resume}. With "
                "auto, every restart of an interrupted run would discard the state again. Give "
                "--resume RUN/checkpoints/step_N"
            )
        problems += [
            f"--trackers must be any of {', '.join(TRACKERS)} ([] for none), got {name!r}"
            for name in self.trackers
            if name not in TRACKERS
        ]
        raise_if(problems)
