"""Provide what every program needs around its work: exit status, stop signals, and the watchdog,
which ends a job that hangs."""
