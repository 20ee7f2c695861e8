"""Evaluation of a sharded model: held-out loss, multiple choice and generated answers.

examples.py       records of the evaluation data: prompt, choices and right answer
questions.py      records -> tokens to score, or prompts to generate from
right_answers.py  whether a generated text is right
eval_set.py       the examples of all metrics, read and tokenised once
adapters.py       PEFT LoRA adapters to evaluate
load_model.py     the base with one adapter, sharded over the ranks
scoring.py        losses and generated texts of one model
eval_metrics.py   the metrics of ``--metrics``
intervals.py      95% confidence intervals
results.py        results as JSON and as a table
eval_command.py   launcher/eval.py
"""
