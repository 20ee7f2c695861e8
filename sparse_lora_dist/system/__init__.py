"""Use the operating system: identify processes, return heap memory, write files atomically."""
