"""The train step and what happens around it: data, resume, logging, saving."""
