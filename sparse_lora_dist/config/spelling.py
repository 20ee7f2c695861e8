"""Suggestions for misspelt words in error messages."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 60
"""Longest word that a suggestion is looked for."""
ELSEWHERE = {
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    **{"lora_alpha": "alpha", "lora_dropout": "dropout", "lora_target": "target_modules"},
    **dict.fromkeys(("model_name_or_path", "base_model", "model_id"), "model"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_file"), "data"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "micro_batch_size"),
    **dict.fromkeys(
        ("max_length", "max_seq_length", "cutoff_len", "sequence_len"), "sequence_length"
    ),
    **{"lr": "learning_rate", "lr_scheduler_type": "lr_schedule", "num_train_epochs": "num_epochs"},
    **{"save_steps": "save_every", "save_total_limit": "keep_last", "eval_steps": "eval_every"},
    **{"deepspeed": "ds_config", "report_to": "trackers", "resume_from_checkpoint": "resume"},
}
"""Options of PEFT, transformers and programs around them -> the same here (docs/from_peft.md)."""


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a suggestion for a misspelt word, to append to a message.

    Args:
        word: The word as the user wrote it.
        known: Words that are allowed.
        prefix: What to put before the suggested word, such as "--".

    Returns:
        Text like "; did you mean --rank?", or "" if no allowed word is similar.
    """
    if len(word) > LONGEST:  # comparing takes time that grows with the length
        return ""
    known, word = list(known), word.replace("-", "_")
    if prefix == "--" and (switch := word.removeprefix("no_")) != word and switch in known:
        return f"; did you mean --{switch} false?"
    same = ELSEWHERE.get(word)
    near = [same] if same in known else get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
