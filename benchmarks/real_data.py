"""Training on published data sets in four formats. ``python benchmarks/real_data.py FOLDER``

FOLDER holds gsm8k/, openbookqa/, arc_easy/ and shakespeare/ as published.
"""

from pathlib import Path

from _job import data_folder, held_out, train, write

SETS = {
    "gsm8k": ("train.jsonl", "test.jsonl", "question", "answer"),
    "openbookqa": ("train.json", "test.json", "instruction", "output"),
    "arc_easy": ("train.json", "test.json", "instruction", "output"),
    "shakespeare": ("input.txt", None, None, None),
}


def flags_of(folder: Path, name: str) -> list[str]:
    """What names the files and columns of one set."""
    data, evaluation, prompt, response = SETS[name]
    flags = ["--data", str(folder / name / data)]
    flags += ["--eval_data", str(folder / name / evaluation)] if evaluation else []
    return flags + (["--prompt_field", prompt, "--response_field", response] if prompt else [])


def main(folder: Path) -> None:
    """Thirty steps on each; a loss before and after."""
    lines = [
        "`python benchmarks/real_data.py FOLDER`: 30 steps of 8 rows of 512 tokens, "
        "2 CPU ranks, the embedded base. Nats per target token, held-out where there is a file.",
        "",
        "| data | before | after |",
        "|---|---|---|",
    ]
    for name in SETS:
        options = ["--max_steps", "30", "--eval_every", "0", "--eval_batches", "8"]
        rows = train(*flags_of(folder, name), *options, "--learning_rate", "1e-3")
        if any("held_out_loss" in row for row in rows):
            before, after = held_out(rows)
        else:
            before, after = rows[0]["loss"], rows[-1]["loss"]
        lines.append(f"| {name} | {before:.4f} | {after:.4f} |")
    write("real_data.md", "\n".join(lines))


if __name__ == "__main__":
    folder = data_folder(".", f"holds {', '.join(SETS)}")
    if folder:
        main(folder)
