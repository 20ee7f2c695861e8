"""Dataclasses that describe a method to the rest of the program: `Method`, `Form` and `Rewriting`.

They consist of data and functions, and every method fills them in.
"""
