"""LoRA: add a trained low-rank product to each frozen weight.

    y = W x + (alpha / R) B A x             A: R x I, B: O x R

A starts as U(-1/sqrt(I), 1/sqrt(I)) and B at zero, so the update starts at zero.

Nothing is decided: the rank stays fixed and nothing is pruned. Every field of `Method`
defaults to LoRA, so this file fills in the name alone.

This implementation differs from the paper: A is uniform, as in PEFT; the paper says Gaussian.

- **Optimizer state:** 8 bytes x trained entries, R (I + O) a linear.
- **Statistics:** none.
- **Exports as:** PEFT LoRA, merged model or sparse delta.
- **Choose it when:** you want the baseline for the other methods.
- **Paper:** Hu et al. 2021, arXiv:2106.09685.

Shapes: I in_features, O out_features, R rank.
"""

from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, NoOptions, RunContext


def lora(options: NoOptions, context: RunContext) -> Method:
    """Return the `Method` that describes plain LoRA to training, planning and export.

    Args:
        options: Unused; LoRA has no options of its own.
        context: Unused.
    """
    return Method(name="lora")


LORA = MethodFactory(
    options=NoOptions,
    build=lora,
    summary="trains a low-rank pair of fixed rank per linear",
)
