"""The global decisions: sharded scores and statistics -> masks and ranks, the same bits on
every rank."""
