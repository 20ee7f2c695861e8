"""Prints a table of the trained modules of an adapter or a checkpoint, with one line per module."""
