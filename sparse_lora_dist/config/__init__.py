"""Options of a run: command line and YAML file -> ``Config`` and DeepSpeed's configuration.

sections.py defines the options, schema.py their types and sections, arguments.py reads argv and
YAML, load.py returns the checked ``Config``, and deepspeed_file.py builds DeepSpeed's dict.
help_pages.py prints the help, sweep.py expands a YAML file with lists into several runs.
"""
