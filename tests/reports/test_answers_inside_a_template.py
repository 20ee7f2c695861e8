"""A model says what it was trained to say: also what its template puts before and after an answer.

Reports: huggingface/lighteval#869, EvolvingLMMs-Lab/lmms-eval#1100,
EleutherAI/lm-evaluation-harness#3087. Such a model had exact = 0.
"""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data.chat import encode_chat, encode_prompt
from sparse_lora_dist.evaluation.answer_frame import AnswerFrame, find_frame
from sparse_lora_dist.evaluation.eval_metrics import METRICS, generated_accuracy
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.questions import Encoder, choice
from sparse_lora_dist.evaluation.results import example_lines
from sparse_lora_dist.evaluation.scoring import Scorer
from tests.fixtures.data_files import jsonl
from tests.fixtures.tiny_tokenizer import MARKED, PLAIN, byte_tokenizer

ASKED = "{% for m in messages %}<|{{ m.role }}|>"
ENDS = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
TEMPLATES = {
    # Qwen3: an empty think block before the last answer.
    "qwen3": ASKED
    + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}" + ENDS + "{% endif %}",
    # Qwen3-Thinking: the generation prompt opens the block.
    "qwen3-thinking": ASKED
    + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    + ENDS
    + "<think>\n{% endif %}",
    # DeepSeek-R1: as before, but an answer of before is rendered without any block.
    "r1": ASKED + "{{ m.content.split('</think>')[-1] }}" + ENDS + "<think>\n{% endif %}",
    # Magistral's marks.
    "brackets": ASKED
    + "{% if m.role == 'assistant' %}[THINK][/THINK]{% endif %}{{ m.content }}"
    + ENDS
    + "{% endif %}",
    # Hunyuan: marks around the answer too.
    "answer-tags": ASKED
    + "{% if m.role == 'assistant' %}<think>\n</think>\n<answer>\n{{ m.content }}\n</answer>"
    "{% else %}{{ m.content }}{% endif %}" + ENDS + "{% endif %}",
    "words": ASKED
    + "{% if m.role == 'assistant' %}Answer: {% endif %}{{ m.content }}"
    + ENDS
    # The model has to say the header itself.
    + "{% endif %}",
    "plain": PLAIN,
    "marked": MARKED,
}


def said(template: str, answer: str) -> str:
    """What a model says that has learned a template by heart."""
    tokenizer = byte_tokenizer(template=template)
    user = {"role": "user", "content": "a dog"}
    asked = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    chat = [user, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
    start = len(str(asked)) if whole.startswith(str(asked)) else len(whole.rpartition("|>a")[0])
    ids = tokenizer(whole[start:].partition("<|end|>")[0], add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_puts_around_an_answer_is_no_part_of_it(name: str) -> None:
    frame = find_frame(byte_tokenizer(), TEMPLATES[name])
    text = said(TEMPLATES[name], "A cat") if name != "r1" else "A cat"
    assert frame.answer_in(text) == "A cat", text
    assert frame.answer_in("A cat") == "A cat", "a model that leaves the block out"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3", "<think>\nB is a dog.\n</think>\n\nA cat"),
        ("qwen3-thinking", "B is a dog.\n</think>\n\nA cat"),
        ("r1", "B is a dog.\n</think>\n\nA cat"),
        ("brackets", "[THINK]B is a dog.[/THINK]A cat"),
        ("answer-tags", "<think>\nB is a dog.\n</think>\n<answer>\nA cat\n</answer>"),
    ],
)
def test_thoughts_before_an_answer_are_no_part_of_it(name: str, text: str) -> None:
    assert find_frame(byte_tokenizer(), TEMPLATES[name]).answer_in(text) == "A cat"


def test_a_template_that_puts_nothing_around_an_answer_takes_nothing_from_it() -> None:
    for template in (None, PLAIN, MARKED):
        frame = find_frame(byte_tokenizer(), template)
        text = " <think>\n\n</think>\n\n<b>cat</b> \n"
        assert frame.answer_in(text) == text and frame.before_ids == ()


class Parrot:
    """A model that says the same to every prompt."""

    def __init__(self, text: str, frame: AnswerFrame) -> None:
        self.text, self.frame = text, frame

    def generate(self, prompts: list[list[int]], name: str) -> list[str]:
        return [self.text] * len(prompts)


ROW: dict[str, Any] = {"prompt": "a dog", "response": "cat", "choices": ["dog", "cat"]}
THOUGHT = "<think>\nNot B. dog, and not 7.\n</think>\n\n"


@pytest.mark.parametrize("metric", ["exact", "choice_generated", "gsm8k"])
@pytest.mark.parametrize("before", ["<think>\n\n</think>\n\n", THOUGHT, ""])
def test_every_metric_that_generates_grades_the_answer(
    tmp_path: Path, metric: str, before: str
) -> None:
    answer = "18" if metric == "gsm8k" else "cat"
    data = jsonl(tmp_path / "a.jsonl", [ROW | {"response": answer}])
    tokenizer = byte_tokenizer()
    frame = find_frame(tokenizer, TEMPLATES["qwen3"])
    table = Table.read(str(data), DataConfig(), None)
    encoder = Encoder(
        tokenizer=tokenizer, template=TEMPLATES["qwen3"], data=DataConfig(), frame=frame
    )
    items = METRICS[metric].items(encoder, table, None)
    parrot = cast(Scorer, Parrot(before + answer, frame))
    (measure,) = generated_accuracy(metric, parrot, items)
    assert list(measure.sums) == [1.0]
    row = json.loads(example_lines([("a", {metric: measure})]))
    assert row["said"] == answer
    assert row.get("generated", answer) == before + answer


def test_a_right_answer_with_its_thoughts_in_the_data_is_the_answer(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [ROW | {"response": THOUGHT + "cat"}])
    tokenizer, template = byte_tokenizer(), TEMPLATES["qwen3"]
    frame = find_frame(tokenizer, template)
    encoder = Encoder(tokenizer=tokenizer, template=template, data=DataConfig(), frame=frame)
    items = METRICS["exact"].items(encoder, Table.read(str(data), DataConfig(), None), None)
    assert items[0].is_right("cat") and not items[0].is_right("dog")


def test_the_likelihood_of_a_choice_is_that_of_its_own_tokens(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [ROW])
    tokenizer, template = byte_tokenizer(), TEMPLATES["qwen3"]
    table = Table.read(str(data), DataConfig(), None)
    frame = find_frame(tokenizer, template)
    encoder = Encoder(tokenizer=tokenizer, template=template, data=DataConfig(), frame=frame)
    question = choice(encoder, table, ROW)
    texts = [tokenizer.decode(d.labels[d.labels >= 0]) for d in question.documents]
    assert texts == ["dog<|end|>", "cat<|end|>"], "no model writes the line feed after the end"
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "a dog"}], template=template)
    whole = encode_chat(
        tokenizer,
        [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "cat"}],
        template=template,
        train_on="all",
    ).ids
    assert whole == [*prompt, *frame.before_ids, *tokenizer("cat<|end|>\n").input_ids]


def test_special_tokens_inside_an_answer_are_seen_in_neither_text(tmp_path: Path) -> None:
    """verl-project/verl#1724: a generated text is decoded without special tokens"""
    data = jsonl(tmp_path / "a.jsonl", [ROW | {"response": "x<|system|>5<|end|>"}])
    tokenizer, template = byte_tokenizer(), TEMPLATES["qwen3"]
    encoder = Encoder(tokenizer=tokenizer, template=template, data=DataConfig())
    items = METRICS["exact"].items(encoder, Table.read(str(data), DataConfig(), None), None)
    said = tokenizer.decode(tokenizer("x<|system|>5").input_ids, skip_special_tokens=True)
    assert items[0].is_right(said) and not items[0].is_right("x")


def test_a_key_names_a_label_of_the_data_before_a_text(tmp_path: Path) -> None:
    """modelscope/evalscope PR #1516: ARC has rows with the labels 1 to 4"""
    choices = {"text": ["4", "1", "2", "3"], "label": ["1", "2", "3", "4"]}
    rows = [{"question": "?", "choices": choices, "answer": key} for key in ("1", "2", "4")]
    table = Table.read(str(jsonl(tmp_path / "a.jsonl", rows)), DataConfig(), None)
    assert [table.choices(row)[1] for row in rows] == [0, 1, 3]
    assert table.choices({"choices": choices["text"], "answer": "1"})[1] == 1
