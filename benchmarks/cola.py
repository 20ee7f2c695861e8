"""CoLA with a random encoder: does a classifier learn? ``python benchmarks/cola.py FOLDER``

FOLDER holds train.tsv and dev.tsv of the published corpus: four columns, no header.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from _job import data_folder, header, train, write
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast

SEEDS = (0, 1, 2)
OPTIONS = {
    "task": "seq_cls",
    "column_names": "source,label,mark,sentence",
    "text_field": "sentence",
    "sequence_length": 64,
    # A frozen random table of words would say nothing of them; the layers stay random, in 4 bit.
    "modules_to_save": "word_embeddings",
    "num_epochs": 4,
    "micro_batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "weight_decay": 0.01,
    "dropout": 0.1,
    "precision": "fp32",
    "log_every": 50,
    "eval_every": 0,
    "eval_batches": 1000,
    "save_every": 0,
    "trackers": "[]",
}


def random_encoder(folder: Path, sentences: list[str]) -> Path:
    """A BERT of one layer that has learned nothing, with 4,000 word pieces of these sentences."""
    inner = BertWordPieceTokenizer()
    inner.train_from_iterator(sentences, vocab_size=4000, show_progress=False)
    BertTokenizerFast(vocab=inner.get_vocab()).save_pretrained(folder)
    config = BertConfig(
        vocab_size=inner.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def scores(rows: list[dict[str, Any]], row: int) -> str:
    """Cells of one held-out row: loss, accuracy, Matthews."""
    found = [r for r in rows if "held_out_matthews" in r][row]
    return " | ".join(f"{found[f'held_out_{k}']:.3f}" for k in ("loss", "accuracy", "matthews"))


def main(folder: Path) -> None:
    """Four epochs with each seed; dev scores before and after, beside the larger class alone."""
    lines = [line.split("\t") for line in (folder / "train.tsv").read_text().splitlines()]
    dev = [line.split("\t")[1] for line in (folder / "dev.tsv").read_text().splitlines()]
    flags = ["--data", str(folder / "train.tsv"), "--eval_data", str(folder / "dev.tsv")]
    flags += [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    table = header("loss", "accuracy", "Matthews", first="dev")
    table.append(
        f"| always {max(dev, key=dev.count)} | | {dev.count('1') / len(dev):.3f} | 0.000 |"
    )
    with tempfile.TemporaryDirectory() as place:
        base = random_encoder(Path(place), [line[3] for line in lines])
        for seed in SEEDS:
            rows = train(*flags, "--model", str(base), "--seed", str(seed))
            table.append(f"| seed {seed}, before | {scores(rows, 0)} |")
            table.append(f"| seed {seed}, after | {scores(rows, -1)} |")
    text = [
        "`python benchmarks/cola.py FOLDER`: a random BERT of one layer, 64 wide, in NF4; LoRA of "
        "rank 16, word embeddings and head trained; 4 epochs of train.tsv, 64 sentences a step, 2 "
        "CPU ranks. Nothing was pre-trained: what is learned is which words and forms go together.",
        "",
        *table,
    ]
    write("cola.md", "\n".join(text))


if __name__ == "__main__":
    folder = data_folder("cola", "holds CoLA's train.tsv and dev.tsv")
    if folder:
        main(folder)
