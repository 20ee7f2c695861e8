"""Operating system: identity of processes, heap memory, and atomic writes of files and folders."""
