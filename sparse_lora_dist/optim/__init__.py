"""The optimizer: AdamW with moments for live entries only, and its learning rates."""
