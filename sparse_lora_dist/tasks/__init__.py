"""Every task there is: what a model can be trained to do. A new one costs its file beside this and
its line here."""

from sparse_lora_dist.tasks.causal_lm import CAUSAL_LM
from sparse_lora_dist.tasks.seq_cls import SEQ_CLS
from sparse_lora_dist.tasks.task import Task

TASKS: dict[str, Task] = {"causal_lm": CAUSAL_LM, "seq_cls": SEQ_CLS}
"""By the name that ``--task`` takes."""

__all__ = ["TASKS", "Task"]
