"""What is in an adapter or a checkpoint, as a table."""
