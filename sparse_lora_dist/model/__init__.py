"""Build the model that trains: frozen base, adapters, and modules trained in full."""
