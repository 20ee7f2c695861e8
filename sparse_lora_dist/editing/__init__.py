"""Knowledge editing: train on new facts, then measure what the edit changed.

edits.py           classes of an edit and its questions
edit_options.py    defines the options of launcher/edit.py
edit_file.py       reads a file of edits in KnowEdit's format
edit_feed.py       tokenises the edits for training: each optimizer step trains on all of them
answer_tokens.py   predicts the tokens of answers, and generates texts
question_scores.py scores each edit from the model's predictions
edit_metrics.py    computes the metrics, as EasyEdit defines them
edit_command.py    runs launcher/edit.py
"""
