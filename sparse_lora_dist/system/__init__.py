"""Operating system: processes, the memory allocator, and files that appear whole or not at all."""
