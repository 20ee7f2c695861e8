"""Ranks: who started them, their collectives, what rank 0 prints. Only ``comm.py`` imports
torch.distributed."""
