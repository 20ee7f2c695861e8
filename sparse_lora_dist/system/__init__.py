"""Uses the operating system: identifies processes, gives free heap memory back, writes files
atomically, reads small files and matches patterns within bounds."""
