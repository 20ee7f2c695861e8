"""Decide which entries of adapters train, and which rank each adapter has, during training.

The masks and ranks are computed from sharded importance scores, with the same bits on every rank.
"""
