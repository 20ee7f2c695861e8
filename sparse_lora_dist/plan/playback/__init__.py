"""ZeRO-3 played back on shapes alone: which parameters are whole when, and what a step
allocates."""
