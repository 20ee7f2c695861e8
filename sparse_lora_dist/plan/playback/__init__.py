"""Simulation of ZeRO-3 on shapes alone: which parameters are gathered when, and what a step
allocates."""
