"""Uses the operating system: identifies processes, gives free heap memory back, writes files
atomically."""
