"""Knowledge editing: train on new facts, then measure what the edit changed.

edits.py          edits and their questions
edit_file.py      reads a file of edits in KnowEdit's format
edit_feed.py      the edits as training data: each step takes all of them
answer_tokens.py  the model's predictions at the tokens of an answer, and generated texts
probe_scores.py   scores of each edit from the model's predictions
edit_metrics.py   the metrics, as EasyEdit defines them
edit_command.py   launcher/edit.py
"""
