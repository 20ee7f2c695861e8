"""Files of the program that somebody else has written, with right hashes or of right JSON."""

from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist.checkpoint.manifest import FORMAT, read_manifest, sealed
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report.saved_steps import saved_steps
from sparse_lora_dist.system.own_files import MARKER, read_marker

FILE = {"name": "rank_0.safetensors", "bytes": 3, "sha256": "0" * 64}
FORGED: dict[str, dict[str, Any]] = {
    "no files": {},
    "files of another type": {"files": {"a": 1}},
    "a file that is text": {"files": ["a"]},
    "a file without a name": {"files": [{"bytes": 3, "sha256": "0"}]},
    "a file elsewhere": {"files": [FILE | {"name": "../../x"}]},
    "a size that is text": {"files": [FILE | {"bytes": "3"}]},
    "no hash": {"files": [{"name": "a", "bytes": 3}]},
    "progress that is a list": {"files": [], "progress": [1]},
    "a step that is text": {"files": [], "progress": {"step": "1"}},
    "a description that is null": {"files": [], "description": None},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_manifest_with_a_right_hash_and_wrong_fields_is_damaged(
    what: str, tmp_path: Path
) -> None:
    step = tmp_path / "step_00000001"
    step.mkdir()
    (step / "manifest.json").write_text(sealed({"format": FORMAT, **FORGED[what]}))
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(step)
    (saved,) = saved_steps(tmp_path)
    assert saved.damage is not None and saved.manifest == {}


@pytest.mark.parametrize("size", ["1e400", "-1e400", "NaN", '"x"', "[]", "9" * 5000])
def test_a_marker_with_an_impossible_size_is_none(size: str, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(
        f'{{"kind": "export", "names": {{"a": [{size}, "0"]}}, "about": {{}}}}'
    )
    assert read_marker(tmp_path) is None
