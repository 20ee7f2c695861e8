"""Write the files of a run folder (``--output_dir``) other than checkpoints and the adapter: the
description of the run, its metrics, the log of its jobs, and the lock."""
