"""Users gave files of edits that no reader takes."""

import json
from pathlib import Path

import pytest

from sparse_lora_dist.editing.edit_file import read_edits
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
