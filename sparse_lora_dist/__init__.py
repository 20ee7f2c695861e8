"""Sparse low-rank adapters over a 4-bit base model that DeepSpeed ZeRO-3 shards across ranks."""

__version__ = "0.1.0"
