"""What a hash of a data set looks at: contents, and neither names nor dates."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_lora_dist.data import fingerprint
from sparse_lora_dist.data.fingerprint import hash_of_documents, hash_of_files


class Some(list[Any]):
    """Documents of these tokens, all of them targets but the first."""

    def __init__(self, *tokens: list[int]) -> None:
        super().__init__((np.array(t), np.array([-100, *t[1:]])) for t in tokens)
        self.lengths = np.array([len(t) for t in tokens])

    def tokens_and_labels(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def test_every_token_of_few_documents_counts() -> None:
    usual: Any = Some([1, 2, 3], [4, 5])
    assert hash_of_documents(usual).startswith("all 2 documents, sha256 ")
    assert hash_of_documents(usual) == hash_of_documents(Some([1, 2, 3], [4, 5]))  # type: ignore[arg-type]
    others: list[Any] = [Some([1, 2, 3], [4, 6]), Some([4, 5], [1, 2, 3]), Some([1, 2, 3, 4], [5])]
    usual[0][1][1] = -100
    assert len({hash_of_documents(d) for d in (*others, usual, Some([1, 2, 3], [4, 5]))}) == 5  # type: ignore[arg-type]


def test_of_many_documents_a_sample_and_all_lengths_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MOST_DOCUMENTS", 3)
    tokens = [[1, n] for n in range(9)]

    def of(place: int, change: list[int]) -> str:
        return hash_of_documents(Some(*tokens[:place], change, *tokens[place + 1 :]))  # type: ignore[arg-type]

    usual = of(0, tokens[0])
    assert usual.startswith("3 of 9 documents")
    changed = [place for place in range(9) if of(place, [1, 99]) != usual]
    assert changed == [0, 4, 8]
    assert all(of(place, [1, 2, 3]) != usual for place in range(9))


def test_files_are_known_by_size_and_content(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("one\n")
    usual = hash_of_files(str(file))
    os.utime(file, (1, 1))
    assert hash_of_files(str(file)) == usual == hash_of_files(str(tmp_path))
    assert hash_of_files(str(file.rename(tmp_path / "b.jsonl"))) == usual
    (tmp_path / "b.jsonl").write_text("two\n")
    assert hash_of_files(str(tmp_path)) != usual
    assert hash_of_files("owner/set") is None


def test_of_a_large_file_both_ends_and_blocks_between_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WHOLE_FILES", 20), ("BLOCKS", 3), ("BLOCK_BYTES", 4)):
        monkeypatch.setattr(fingerprint, name, value)
    file = tmp_path / "a.txt"

    def of(raw: bytearray) -> str | None:
        file.write_bytes(raw)
        return hash_of_files(str(file))

    usual, seen = of(bytearray(30)), []
    for place in range(30):
        raw = bytearray(30)
        raw[place] = 1
        seen += [place] if of(raw) != usual else []
    assert seen == [0, 1, 2, 3, 13, 14, 15, 16, 26, 27, 28, 29]
    assert of(bytearray(31)) != usual
