"""Cache of the quantised base on disk (``--base_cache``), so that later jobs load it faster."""
