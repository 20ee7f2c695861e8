"""Simulation of a training step with ZeRO-3, without weights: which parameters are gathered when,
and which activations and temporaries the step allocates (measured on the meta device)."""
