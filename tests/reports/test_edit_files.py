"""Users gave files of edits that no reader takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist.editing.answer_tokens import encode
from sparse_lora_dist.editing.edit_file import read_edits
from sparse_lora_dist.editing.edits import Question, numbered
from sparse_lora_dist.errors import UserError
from tests.fixtures.tiny_tokenizer import byte_tokenizer

EDIT = {"subject": "s", "prompt": "p", "target_new": "t"}
BROKEN = {
    "nested too deep": (json.dumps(EDIT) + "\n" + "[" * 100_000, r"e\.json:2 .*RecursionError"),
    "a list nested too deep": ("[" * 100_000, r"e\.json:1 .*RecursionError"),
    "a number of 5,000 digits": ('[{"subject": ' + "1" * 5000 + "}]", r"e\.json:1 .*ValueError"),
    "null lines": ("null\n" * 30, r"has 30 problems:(.|\n)*got NoneType(.|\n)*and 10 more"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_edits_that_no_reader_takes_are_one_message(tmp_path: Path, case: str) -> None:
    content, message = BROKEN[case]
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_edits(tmp_path / "e.json")


def test_a_prompt_of_several_texts_is_refused_with_its_line(tmp_path: Path) -> None:
    question = {"prompt": ["a", "b"], "ground_truth": ["c", "d"]}
    bad = EDIT | {"prompt": ["a", "b"], "locality": {"K": [question]}}
    good = EDIT | {"prompt": ["a"], "target_new": ["c", "d"]}
    (tmp_path / "e.json").write_text(json.dumps(good) + "\n" + json.dumps(bad))
    with pytest.raises(UserError, match="has 2 problems") as refused:
        read_edits(tmp_path / "e.json")
    assert "e.json:2: edit 2: prompt must be one text, got a list" in str(refused.value)
    assert "locality.K[0].prompt must be one text" in str(refused.value)


@pytest.mark.parametrize(
    ("target", "said"), [("t", "with the same target_new"), ("u", "with 't' and 'u'")]
)
def test_two_edits_of_one_prompt_are_not_made_together(
    tmp_path: Path, target: str, said: str
) -> None:
    rows = [EDIT | {"prompt": "q"}, EDIT, EDIT | {"prompt": "p ", "target_new": target}]
    (tmp_path / "e.json").write_text(json.dumps(rows))
    edits = read_edits(tmp_path / "e.json").edits
    with pytest.raises(UserError, match=f"--number 1 and 2 have the same prompt, {said}"):
        numbered(edits, "1:", "e.json")
    assert len(numbered(edits, "0:2", "e.json")) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "q"}, "prompt and text are two names of one field, but have different values"),
        ({"labels": "u"}, "target_new and labels are two names of one field"),
        ({"concept": ["v", "s"]}, "subject and concept are two names of one field"),
        (
            {"rephrase_prompt": "q", "rephrase": "r"},
            "rephrase_prompt and rephrase are two names of one field",
        ),
    ],
)
def test_a_field_under_two_names_is_refused(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    (tmp_path / "e.json").write_text(json.dumps(EDIT | fields))
    with pytest.raises(UserError, match=rf"has 1 problem:\n.*e\.json:1: edit 1: {said}"):
        read_edits(tmp_path / "e.json")


@pytest.mark.parametrize("nothing", [None, "", " ", []])
def test_the_other_name_of_a_field_counts_where_one_has_no_text(
    tmp_path: Path, nothing: object
) -> None:
    """Tables written by pandas have null there."""
    edit = {"subject": "s", "concept": "s", "prompt": nothing, "text": "p", "target_new": "t"}
    edit |= {"rephrase_prompt": nothing, "rephrase": "r", "labels": nothing}
    (tmp_path / "e.json").write_text(json.dumps(edit))
    (one,) = read_edits(tmp_path / "e.json").edits
    assert one.fact == Question(prompt="p", answer="t")
    assert one.rephrased == Question(prompt="r", answer="t")


@pytest.mark.parametrize("prompt", ["{subject} was born in", "[X] was born in [Y]"])
def test_place_holders_of_other_data_sets_are_refused(tmp_path: Path, prompt: str) -> None:
    edit = EDIT | {"subject": "Ada", "prompt": prompt}
    (tmp_path / "e.json").write_text(json.dumps(edit))
    with pytest.raises(UserError, match=r"has the place holder [\[{](subject|X)[\]}]"):
        read_edits(tmp_path / "e.json")


@pytest.mark.parametrize("name", ["locality", "portability"])
def test_a_place_holder_in_a_question_is_refused(tmp_path: Path, name: str) -> None:
    questions = [
        {"prompt": "{}'s father is", "ground_truth": "a"},
        {"prompt": "What Ada's {} means:", "ground_truth": "a"},
    ]
    edit = EDIT | {"subject": "Ada", name: {"K": questions}}
    (tmp_path / "e.json").write_text(json.dumps(edit))
    with pytest.raises(UserError, match=rf"has 1 problem(.|\n)*{name}\.K has the place holder"):
        read_edits(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("prompt", "answer", "text", "scored"),
    [
        ("in", "Rome", "in Rome", " Rome"),
        ("in", " Rome", "in Rome", " Rome"),
        ("in ", "Rome", "in Rome", "Rome"),
        ("in\n", "Rome", "in\nRome", "Rome"),
    ],
)
def test_one_space_stands_between_a_prompt_and_its_answer(
    prompt: str, answer: str, text: str, scored: str
) -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(tokenizer, Question(prompt=prompt, answer=answer))
    assert tokenizer.decode(encoded.ids) == text
    assert tokenizer.decode(encoded.answer) == scored
