"""What the operating system gives: processes, the memory allocator, files that are whole or
absent."""
