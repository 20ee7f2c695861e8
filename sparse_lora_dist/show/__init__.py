"""Program of launcher/show.py: prints a table of the trained modules of a PEFT adapter or of a
checkpoint, with one line per module."""
