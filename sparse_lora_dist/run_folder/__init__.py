"""Write the files of a run folder other than checkpoints and the adapter: description, metrics,
attempts and lock."""
