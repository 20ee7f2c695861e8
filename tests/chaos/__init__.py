"""Runs that are killed, at moments chosen and at moments drawn, and must come to the same end."""
