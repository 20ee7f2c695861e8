"""Base cache (``--base_cache``): the quantised base on disk, so that later jobs load it faster."""
