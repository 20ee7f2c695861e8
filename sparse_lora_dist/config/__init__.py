"""Options of a run: command line and YAML file -> ``Config`` and DeepSpeed's configuration.

sections.py defines the options, schema.py their types and sections, arguments.py reads argv and
YAML, load.py returns the checked ``Config``, and deepspeed_file.py builds the dict for
``deepspeed.initialize``. paths.py finds paths that do not exist, help_pages.py makes the help, and
sweep.py expands a YAML file with lists of values into several runs.
"""
