"""Tasks that a model can be trained for: causal_lm and seq_cls.

To add a task, add a file with its ``Task`` to this folder, and an item to ``TASKS``.
"""

from sparse_lora_dist.tasks.causal_lm import CAUSAL_LM
from sparse_lora_dist.tasks.seq_cls import SEQ_CLS
from sparse_lora_dist.tasks.task import Task

TASKS: dict[str, Task] = {"causal_lm": CAUSAL_LM, "seq_cls": SEQ_CLS}
"""Value of ``--task`` -> the task."""

__all__ = ["TASKS", "Task"]
