"""The table of an adapter or a checkpoint: one line per module."""
