"""Options of a run: command line and YAML file -> ``Config`` and DeepSpeed's configuration.

sections.py (every option) -> schema.py (types, help) -> arguments.py (argv and YAML as given)
-> load.py (checked ``Config``); deepspeed_file.py makes DeepSpeed's dict of it.
"""
