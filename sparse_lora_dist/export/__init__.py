"""EXPORT: what was trained, as files that other tools open.

peft_adapter.py   a plain LoRA adapter of what lives; init_adapter.py reads one back
trained.py        what a checkpoint holds, in one process without a GPU or DeepSpeed
merged.py         a whole model, the deltas added to its weights
sparse_delta.py   the changed weights alone, applied and taken back bit for bit
program.py        launcher/export.py
"""
