"""Will it fit? Bytes per rank, traffic and time of a run, from a model's shapes alone."""
