"""Load the frozen base model, quantised to NF4 one shard at a time."""
