"""HTML report of one or several runs. ``run_data.py`` reads a run folder, the other files draw the
figures and write the page."""
