"""Decisions of sparse methods: sharded scores and statistics give masks and ranks, which are the
same bits on every rank."""
