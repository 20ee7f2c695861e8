"""Ranks: how they were launched, their collectives, and what rank 0 prints.

Only ``comm.py`` imports torch.distributed.
"""
