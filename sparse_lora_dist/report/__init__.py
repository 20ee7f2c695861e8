"""Program of launcher/report.py: an HTML report of one or several runs. ``run_data.py`` reads a run
folder (a run's ``--output_dir``); the other files draw the figures and write the page."""
