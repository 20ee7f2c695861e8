"""AdamW for tensors of which only some entries train, and the learning rates of these entries.

An entry is live if the optimizer steps it. Only live entries have moments. Their learning rate
depends on the step, and on the step at which they became live (birth step).
"""
