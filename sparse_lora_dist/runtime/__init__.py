"""What stands around any program: exit codes, signals, the watchdog over stuck ranks."""
