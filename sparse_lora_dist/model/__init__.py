"""The model that trains: base, adapters, and modules trained in full, put together."""
