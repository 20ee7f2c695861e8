"""Keys that a DeepSpeed file in ds_configs/ may have, and the values they may take.

Names and types are those of DeepSpeed 0.19 (runtime/zero/config.py, offload_config.py,
constants.py). Keys without effect under stage 3 or on a client optimizer are not supported.
"""

from typing import Any

KEYS: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "communication_data_type": str,
    "data_types": {"grad_accum_dtype": str},
    "bf16": {"enabled": bool, "check_grad_overflow": bool},
    "fp16": {"enabled": bool},
    "zero_optimization": {
        "stage": int,
        "contiguous_gradients": bool,
        "overlap_comm": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": int,
        "sub_group_size": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_param_persistence_threshold": int,
        "stage3_model_persistence_threshold": int,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_module_granularity_threshold": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "stage3_allgather_sequential": bool,
        "zero_hpz_partition_size": int,
        "zero_quantized_weights": bool,
        "zero_quantized_nontrainable_weights": bool,
        "zero_quantized_gradients": bool,
        "log_trace_cache_warnings": bool,
        "enable_sanity_checks": bool,
        "offload_param": {
            "device": ("none", "cpu", "nvme"),
            "nvme_path": str,
            "buffer_count": int,
            "buffer_size": int,
            "pin_memory": bool,
        },
        "offload_optimizer": {"device": ("none", "cpu"), "pin_memory": bool},
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool},
}
"""{key of the file: what its value may be}. The latter is a type, a tuple of allowed words, or a
dict with the keys of a nested ``{...}`` block."""

PACKED = "it treats weights as floats, and those of a 4-bit base are packed bytes"
"""Reason, for messages, why keys that compute with the weights are refused."""
STATISTICS = "importance statistics are computed from the gradients in full precision"
"""Reason, for messages, why keys that reduce the precision of gradients are refused."""

FIXED: dict[str, tuple[object, str]] = {
    "zero_optimization.stage": (3, "only stage 3 shards the base model"),
    "zero_optimization.zero_quantized_weights": (False, PACKED),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, PACKED),
    # DeepSpeed then gathers by adding zeros to every shard, which alters signalling NaNs.
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": (False, PACKED),
    "zero_optimization.zero_quantized_gradients": (False, STATISTICS),
    "communication_data_type": ("fp32", STATISTICS),
    "data_types.grad_accum_dtype": ("fp32", STATISTICS),
    "fp16.enabled": (False, PACKED + ". Use --precision bf16 or fp32"),
    "aio.use_gds": (False, "shards pass through host memory"),
    "zero_allow_untested_optimizer": (True, "the optimizer is this project's own"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is this project's own"),
}
"""{dotted key: (the only value that works, reason)}. All of these keys except
zero_optimization.stage may be left out."""

AT_LEAST_ONE = {
    "steps_per_print",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.offload_param.buffer_count",
    "zero_optimization.offload_param.buffer_size",
    "aio.block_size",
    "aio.queue_depth",
    "aio.intra_op_parallelism",
}
"""Dotted keys of numbers that must not be 0, because DeepSpeed divides by them or waits for that
many, and would fail or hang."""

AT_MOST = {
    "zero_optimization.reduce_bucket_size": 2**40,
    "zero_optimization.offload_param.buffer_count": 2**20,
    "zero_optimization.offload_param.buffer_size": 2**40,
    "aio.block_size": 2**30,
    "aio.queue_depth": 2**20,
    "aio.intra_op_parallelism": 2**10,
}
"""{dotted key: largest value} of numbers that DeepSpeed allocates memory or threads by. Larger ones
fit no machine, and their sizes in bytes overflow in PyTorch or in C."""

WHY_NOT = {
    "zero_optimization.offload_optimizer.device": "DeepSpeed's NVMe swapper needs moments of every "
    "entry, and here only the entries that are trained have them",
}
"""{dotted key: reason why some values that DeepSpeed takes do not work here}, for messages."""

KNOWN_ELSEWHERE = {
    "optimizer": "is set by options here. Remove it and set --learning_rate, --weight_decay",
    "scheduler": "is set by options here. Remove it and set --lr_schedule, --warmup_steps",
    "activation_checkpointing": "is an option here. Remove it and set --gradient_checkpointing",
    "tensorboard": "is an option here. Remove it and set --trackers",
    "wandb": "is an option here. Remove it and set --trackers",
    "bfloat16": "is an old name. Write bf16",
    "zero_optimization.offload_param.max_in_cpu": "has no effect, because trained tensors stay "
    "in memory. Remove it",
}
"""{key that is refused: end of the message, with what to do}. For other unknown keys the message
suggests the nearest known key."""

OWNED = {
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "train_batch_size": "--micro_batch_size x --gradient_accumulation_steps x ranks",
    "bf16.enabled": "--precision",
}
"""{dotted key: options of the run that set its number}. The file may have "auto" or an equal
number."""
