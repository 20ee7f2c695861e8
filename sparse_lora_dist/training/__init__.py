"""STEP: the train step and what stands around it: data, resume, logging, saving."""
