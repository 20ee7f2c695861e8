"""Stage INJECT: add adapters to frozen linears, and read PEFT LoRA adapters to start from."""
