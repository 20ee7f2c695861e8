"""Tasks that a model can be trained for. A new task needs a file here and a line in ``TASKS``."""

from sparse_lora_dist.tasks.causal_lm import CAUSAL_LM
from sparse_lora_dist.tasks.seq_cls import SEQ_CLS
from sparse_lora_dist.tasks.task import Task

TASKS: dict[str, Task] = {"causal_lm": CAUSAL_LM, "seq_cls": SEQ_CLS}
"""Tasks by the name that ``--task`` takes."""

__all__ = ["TASKS", "Task"]
