"""INJECT: adapters on frozen linears, and reading of PEFT LoRA adapters to start from."""
