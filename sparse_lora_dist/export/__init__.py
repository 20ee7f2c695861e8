"""Export of a trained adapter as files that other tools open.

trained_run.py    reads a checkpoint in one process, without a GPU or DeepSpeed
sum_of_runs.py    the sum of several runs over one base (``--plus``)
open_base.py      the weights of the base model that a run was trained over
weight_change.py  what an adapter adds to one weight, computed a few rows at a time
peft_adapter.py   a plain LoRA in PEFT's format, of the components with a nonzero update
peft_own_type.py  an adapter of another PEFT type, for methods that are not LoRA
merged.py         a whole model with the updates added to its weights
sparse_delta.py   indices and values of the changed weights; applied and undone bit for bit
card.py           the README.md beside each export
export_command.py launcher/export.py
after_training.py the adapter folder of a run whose method is not LoRA
"""
