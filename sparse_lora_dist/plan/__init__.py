"""The planner: memory per rank, traffic and time of a run, from the model's shapes alone."""
