"""Add adapters to the frozen linears of a model, and read PEFT LoRA adapters as initial values."""
