"""Simulation of a training step with ZeRO-3 on the meta device: when which parameters are gathered,
and what the step allocates."""
