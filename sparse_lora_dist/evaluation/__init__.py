"""Evaluation of a sharded model: held-out loss, multiple choice and generated answers.

examples.py       reads the evaluation data: prompt, choices and right answer of each example
questions.py      tokenises examples: texts to score, or prompts to generate from
answer_frame.py   finds what a chat template puts around an answer
right_answers.py  checks whether a generated text is the right answer
eval_set.py       reads and tokenises the examples of all metrics once
adapters.py       opens the PEFT LoRA adapters to evaluate
load_model.py     loads the base with one adapter, sharded over the ranks
scoring.py        computes losses and generates texts with one model
eval_metrics.py   defines the metrics of ``--metrics``
intervals.py      computes 95% confidence intervals
results.py        turns results into JSON and a text table
eval_options.py   defines the options of launcher/eval.py
eval_command.py   runs launcher/eval.py
"""
