"""Planner of launcher/plan.py: computes memory per rank, traffic and time of a run from the model's
config.json, without reading weights."""
