"""Make the default model and data set that a bare ``launcher/train.py`` uses.

About a quarter of an hour on one core. See LICENSES.md for the command and the sources. The same
seed, versions and kind of processor give the same bytes; another processor rounds differently.
"""

import argparse
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import make_data
import pretrain
import torch
from make_data import Texts
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

UNSEEN_SAMPLE_CHARACTERS = 16_000
"""Unseen text of each source that ships, so that a test can measure the perplexity again."""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # sums in another order would give other weights
    torch.use_deterministic_algorithms(True)
    texts, finetuning = make_data.cut(args.shakespeare, args.gsm8k)

    make_data.write_finetuning(finetuning, args.output / "gsm8k")
    shutil.copyfile(args.gsm8k_license, args.output / "gsm8k" / "LICENSE")
    write_texts(texts, args.output)

    tokenizer = pretrain.train_tokenizer([texts.shakespeare_pretrain, *texts.gsm8k_pretrain])
    model = pretrain.new_model(tokenizer, seed=args.seed)
    tokens = pretrain.encode(tokenizer, [texts.shakespeare_pretrain, *texts.gsm8k_pretrain])
    pretrain.train(model, tokens, steps=args.steps, seed=args.seed)

    # Measured as it ships. transformers hides the signature of "to" from mypy.
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    figures = measure(model, tokenizer, texts, tokens)
    save(model, tokenizer, report(args, model, tokens, figures), args.output / "base")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shakespeare", type=Path, required=True, help="plain text")
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--gsm8k_license", type=Path, required=True, help="its licence file")
    parser.add_argument("--output", type=Path, default=Path("assets"), help="folder to write")
    parser.add_argument("--steps", type=int, default=900, help="pre-training steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_texts(texts: Texts, folder: Path) -> None:
    """What the overlap and perplexity tests read."""
    lines = "".join(f"{problem}\n" for problem in texts.gsm8k_pretrain)
    make_data.write_text(folder / "pretraining_gsm8k.txt", lines)
    gsm8k = "\n".join(texts.gsm8k_unseen)[:UNSEEN_SAMPLE_CHARACTERS]
    shakespeare = texts.shakespeare_unseen[:UNSEEN_SAMPLE_CHARACTERS]
    make_data.write_text(folder / "unseen.txt", f"{shakespeare}\n{gsm8k}\n")


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Texts,
    pretraining: torch.Tensor,
) -> dict[str, Mapping[str, float]]:
    """Nats per token and perplexity on each source's unseen text, beside a unigram model's."""
    unseen = {"shakespeare": [texts.shakespeare_unseen], "gsm8k": texts.gsm8k_unseen}
    unseen["both"] = unseen["shakespeare"] + unseen["gsm8k"]
    figures: dict[str, Mapping[str, float]] = {}
    for source, documents in unseen.items():
        tokens = pretrain.encode(tokenizer, documents)
        nats = torch.tensor(
            [pretrain.model_nats(model, tokens), pretrain.unigram_nats(pretraining, tokens)]
        )
        perplexity = nats.exp()
        figures[source] = {
            "tokens": len(tokens),
            "nats_per_token": round(nats[0].item(), 4),
            "unigram_nats_per_token": round(nats[1].item(), 4),
            "perplexity": round(perplexity[0].item(), 2),
            "unigram_perplexity": round(perplexity[1].item(), 2),
        }
    return figures


def report(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    figures: dict[str, Mapping[str, float]],
) -> dict[str, object]:
    """How the model came about and how good it is, for ``pretraining.json``."""
    gsm8k_lines = {
        "pretraining": make_data.PRETRAIN_LINES,
        "unseen": make_data.UNSEEN_LINES,
        "finetuning": make_data.FINETUNE_LINES,
        "heldout": make_data.HELDOUT_LINES,
    }
    return {
        "parameters": model.num_parameters(),
        "steps": args.steps,
        "tokens_per_step": pretrain.BATCH_ROWS * pretrain.ROW_TOKENS,
        "tokens_trained_on": args.steps * pretrain.BATCH_ROWS * pretrain.ROW_TOKENS,
        "tokens_in_corpus": len(tokens),
        "seed": args.seed,
        "unseen": figures,
        "shakespeare_sha256": make_data.sha256(args.shakespeare),
        "shakespeare_unseen_from_line": make_data.SHAKESPEARE_UNSEEN_FROM,
        "gsm8k_sha256": make_data.sha256(args.gsm8k),
        "gsm8k_lines": {part: [r.start, r.stop - 1] for part, r in gsm8k_lines.items()},
        "torch": torch.__version__,
        "processor": platform.machine(),
    }


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    summary: dict[str, object],
    folder: Path,
) -> None:
    """A folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_data.write_text(folder / "pretraining.json", json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
