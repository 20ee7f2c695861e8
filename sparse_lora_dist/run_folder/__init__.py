"""Files of a run folder besides checkpoints and the adapter: description, metrics, attempts and
lock."""
