"""The 4-bit base kept on disk, so that later jobs load it faster."""
