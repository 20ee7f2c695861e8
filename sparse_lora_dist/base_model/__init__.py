"""LOAD: the frozen base, quantised to NF4 one shard at a time."""
