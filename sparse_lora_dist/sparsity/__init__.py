"""Decide during training which entries of adapters train, and how many rank-1 components each has.

The decisions are computed from sharded importance scores, with the same bits in every process.
"""
