"""A merged export from a base whose files are links that lead nowhere, as in a pruned hub cache."""

from pathlib import Path

import pytest

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.merged_files import files_to_copy


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "original").mkdir()
    return tmp_path


def replaced_by_link(file: Path, target: str) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("target", ["../blobs/gone", "SELF"])
def test_a_broken_link_is_refused_by_name(base: Path, name: str, target: str) -> None:
    replaced_by_link(base / name, target.replace("SELF", name))
    with pytest.raises(UserError, match=f"{name} is a link to no file") as caught:
        files_to_copy(base)
    assert "--base FOLDER" in str(caught.value)


def test_all_broken_links_are_named_at_once(base: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        replaced_by_link(base / name, "gone")
    with pytest.raises(UserError, match=r"tokenizer\.json, vocab\.json are links"):
        files_to_copy(base)


def test_links_to_files_are_copied_and_broken_links_of_what_is_not_copied_are_passed(
    base: Path,
) -> None:
    (base / "blobs").mkdir()
    (base / "blobs" / "1").write_text("{}")
    replaced_by_link(base / "tokenizer.json", "blobs/1")
    for name in ("README.md", "pytorch_model.bin", "old.safetensors.index.json"):
        replaced_by_link(base / name, "gone")
    assert [path.name for path in files_to_copy(base)] == ["config.json", "tokenizer.json"]
