"""The default base model and data set: small, truly trained, and strangers to each other."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(__file__).parents[2] / "assets"
CONVERSATION = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "What is 12 + 30?\n"},
    {"role": "assistant", "content": " 12+30 = <<12+30=42>>42\n#### 42"},
    {"role": "user", "content": "Ça va… ½ €?"},
    {"role": "assistant", "content": "\nOui."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "base")


@pytest.fixture(scope="module")
def report():
    return json.loads((ASSETS / "base" / "pretraining.json").read_text())


def rows(name):
    lines = (ASSETS / "gsm8k" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text):
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def words_without_numbers(text):
    return re.sub(r"[0-9]+", "0", words(text))


@pytest.mark.parametrize("normalised", [words, words_without_numbers])
def test_no_finetuning_problem_occurs_in_the_pretraining_text(normalised):
    pretraining = normalised((ASSETS / "pretraining_gsm8k.txt").read_text(encoding="utf-8"))
    questions = [normalised(row["prompt"]) for row in rows("train.jsonl") + rows("heldout.jsonl")]
    assert sum(question in pretraining for question in questions) == 0


def test_no_heldout_problem_is_trained_on():
    trained = {words_without_numbers(row["prompt"]) for row in rows("train.jsonl")}
    heldout = {words_without_numbers(row["prompt"]) for row in rows("heldout.jsonl")}
    assert len(trained) == len(rows("train.jsonl"))
    assert len(heldout) == len(rows("heldout.jsonl"))
    assert not trained & heldout


def test_unseen_text_is_not_in_the_pretraining_text():
    pretraining = (ASSETS / "pretraining_gsm8k.txt").read_text(encoding="utf-8").split("\n")
    unseen = (ASSETS / "unseen.txt").read_text(encoding="utf-8").split("\n")
    assert not set(pretraining) & set(unseen) - {""}


def test_the_finetuning_form_is_new_to_the_base_model():
    pretraining = (ASSETS / "pretraining_gsm8k.txt").read_text(encoding="utf-8")
    assert not re.search(r"<<|>>|####|<\|", pretraining)
    responses = [row["response"] for row in rows("train.jsonl") + rows("heldout.jsonl")]
    assert all(re.search(r"\n#### \S+$", response) for response in responses)
    assert sum("<<" in response for response in responses) > 0.9 * len(responses)


def test_model_is_small_and_complete(report):
    model, loading = AutoModelForCausalLM.from_pretrained(ASSETS / "base", output_loading_info=True)
    assert not any(loading.values()), loading
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.num_parameters() == report["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weights = (ASSETS / "base").glob("*.safetensors")
    assert sum(file.stat().st_size for file in weights) <= 8_000_000


def test_perplexity_is_at_most_half_of_any_unigram_model(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "base")
    text = (ASSETS / "unseen.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        nats = model(input_ids=windows, labels=windows).loss.item()
    # Counted on the measured text itself: no unigram model, however trained, does better.
    counts = torch.bincount(tokens).double()
    p = counts[counts > 0] / counts.sum()
    best_unigram_nats = -(p * p.log()).sum().item()
    assert math.exp(nats) <= 0.5 * math.exp(best_unigram_nats)


def test_report_agrees_with_the_files(report, tokenizer):
    assert report["unseen"]["both"]["tokens"] > 20_000
    for source in report["unseen"].values():
        assert source["perplexity"] <= 0.5 * source["unigram_perplexity"]
        assert math.isclose(math.log(source["perplexity"]), source["nats_per_token"], abs_tol=1e-3)
    first, last = report["gsm8k_lines"]["pretraining"]
    pretraining = (ASSETS / "pretraining_gsm8k.txt").read_text(encoding="utf-8")
    assert 0.99 * (last - first + 1) <= pretraining.count("\n") <= last - first + 1
    assert report["tokens_in_corpus"] > len(tokenizer(pretraining)["input_ids"])


def test_shorter_conversation_is_a_prefix_of_the_longer_one(tokenizer):
    def render(messages, **options):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        tokens = tokenizer.apply_chat_template(messages, return_dict=False, **options)
        assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
        return text, tokens

    for end in range(1, len(CONVERSATION)):
        text, tokens = render(CONVERSATION[: end + 1])
        prompted = CONVERSATION[end]["role"] == "assistant"
        for options in [{}, {"add_generation_prompt": True}] if prompted else [{}]:
            text_before, tokens_before = render(CONVERSATION[:end], **options)
            assert text.startswith(text_before)
            assert tokens[: len(tokens_before)] == tokens_before


def test_generation_marks_cover_the_answers_and_their_end(tokenizer):
    rendered = tokenizer.apply_chat_template(
        CONVERSATION, return_dict=True, return_assistant_tokens_mask=True
    )
    marks = rendered["assistant_masks"]
    marked = [t for t, mark in zip(rendered["input_ids"], marks, strict=True) if mark]
    answers = [m["content"] for m in CONVERSATION if m["role"] == "assistant"]
    assert tokenizer.decode(marked) == "".join(f"{answer}<|end|>" for answer in answers)


def test_unknown_role_is_refused(tokenizer):
    with pytest.raises(TemplateError, match="system, user and assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "42"}], tokenize=False)


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "  Two  spaces , 1234.50 €\n\n\t½ — 你好 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("2048")["input_ids"]) == 4, "digits stand alone"
