"""EVALUATE: held-out loss and answers of a base, merged or adapted, sharded as in training."""
