"""Edit facts that a language model knows, and measure what else the edit changed.

edits (a file of them) -> feed (a row an edit) -> training as always -> answers -> metrics
"""
