"""Communication between ranks: launch, collectives, joint error handling, output of rank 0.

Only ``comm.py`` imports torch.distributed.
"""
