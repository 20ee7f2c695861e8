"""Decisions of sparse methods: compute masks and ranks of sites from sharded scores and statistics,
with the same bits on every rank."""
