"""Make the optimizer steps of a training run, and do the work around them: data, resume, logging,
checkpoints."""
