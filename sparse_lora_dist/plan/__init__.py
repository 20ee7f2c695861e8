"""Planner of launcher/plan.py: computes the memory, the network traffic and the time that each rank
of a training run needs. It reads the model's config.json and no weights."""
