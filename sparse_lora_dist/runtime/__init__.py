"""What every program has around its work: exit codes, stop signals, the watchdog."""
