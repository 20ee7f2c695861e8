"""Dataclasses that describe a method to the rest of the program: `Method`, `Form` and `Rewriting`.

Each is a record of data and functions, and every method fills them in.
"""
