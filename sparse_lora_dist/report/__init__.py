"""The HTML report of a run: ``run_data.py`` reads the run folder, the others draw and write."""
