"""LoRA: W + (alpha / R) B A with W frozen. Hu et al. 2021, arXiv:2106.09685.

Every default of the record is plain LoRA, so there is nothing to fill in. As in PEFT, A starts as
U(-1/sqrt(I), 1/sqrt(I)) (the paper says Gaussian) and B at zero.
"""

from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, NoOptions, RunContext


def lora(options: NoOptions, context: RunContext) -> Method:
    """Plain LoRA: no statistics, no decisions, nothing pruned."""
    return Method(name="lora")


LORA = MethodFactory(options=NoOptions, build=lora, summary="fixed rank, nothing pruned")
