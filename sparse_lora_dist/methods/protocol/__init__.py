"""The records of functions that a method fills in."""
