"""What every program needs around its work: exit status, stop signals, and the watchdog."""
