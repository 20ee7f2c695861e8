"""AdamW with moments for live entries only, and learning rates by step and birth step."""
