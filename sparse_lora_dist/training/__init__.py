"""The optimizer step of a training run, and the work around it: data, resume, logging, saving."""
