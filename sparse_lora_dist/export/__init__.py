"""Export of a trained adapter as files that other tools open.

"Update" means what an adapter adds to a weight of the base model: delta W, its scale included.
A "site" is a linear with an adapter (PEFT: target module).

trained_run.py    reads a checkpoint in one process, without a GPU or DeepSpeed
sum_of_runs.py    adds the adapters of several runs over one base (``--plus``)
open_base.py      reads the weights of the base model that a run was trained over
weight_change.py  computes what an adapter adds to one weight, a few rows at a time
peft_adapter.py   writes a plain LoRA in PEFT's format, without components that add nothing
peft_own_type.py  writes an adapter as another PEFT type than LoRA, for methods whose update is
                  not a LoRA
merged.py         writes a whole model with the updates added to its weights
merged_files.py   writes its other files: config, tokenizer, chat template, generation settings
sparse_delta.py   writes the nonzero updates as indices and values; adds them to a model's weights,
                  and restores the weights
card.py           writes the README.md of an export
export_command.py runs launcher/export.py
after_training.py writes the adapter of a finished run as another PEFT type, if its update is not a
                  LoRA
"""
