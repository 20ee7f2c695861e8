"""Users gave files of edits that no reader takes."""

import json
from pathlib import Path

import pytest

from sparse_lora_dist.editing.edit_file import read_edits
from sparse_lora_dist.editing.edits import numbered
from sparse_lora_dist.errors import UserError

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
