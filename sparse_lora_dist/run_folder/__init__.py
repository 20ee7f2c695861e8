"""Files of a run folder besides checkpoints and the adapter: its description, metrics,
attempts, lock."""
