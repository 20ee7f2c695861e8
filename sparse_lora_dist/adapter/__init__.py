"""INJECT: adapters on frozen linears, and plain LoRA adapters of PEFT read in."""
