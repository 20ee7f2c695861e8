"""A base whose safetensors files have headers that the library safetensors refuses.

What the library does not open, transformers and PEFT do not open either, and a range of bytes that
no valid header describes would be read as weights without a word.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from sparse_lora_dist.base_model.safetensors_reader import read_header
from sparse_lora_dist.errors import UserError

GOOD: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = GOOD | {"data_offsets": [8, 16]}
TEXT = json.dumps(GOOD)


def write(file: Path, header: Any, nbytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    return file


def library_opens(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy"):
            return True
    except SafetensorError:
        return False


def we_open(file: Path) -> bool:
    try:
        read_header(file)
    except UserError:
        return False
    return True


REFUSED: dict[str, tuple[Any, int]] = {
    "offsets are floats": ({"a": GOOD | {"data_offsets": [0.0, 8.0]}}, 8),
    "a shape of floats": ({"a": GOOD | {"shape": [2.0]}}, 8),
    "a shape of booleans": ({"a": GOOD | {"shape": [True, 2]}}, 8),
    "a negative shape": ({"a": GOOD | {"shape": [-1, -2]}}, 8),
    "a tensor begins before the data": ({"a": GOOD | {"data_offsets": [-4, 4]}}, 8),
    "a tensor ends before it begins": ({"a": GOOD | {"data_offsets": [8, 0]}}, 8),
    "three offsets": ({"a": GOOD | {"data_offsets": [0, 8, 9]}}, 9),
    "two tensors overlap": ({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, 12),
    "a hole between two tensors": ({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, 20),
    "bytes after the last tensor": ({"a": GOOD}, 9),
    "a tensor of 2^80 elements": ({"a": GOOD | {"shape": [2**40, 2**40]}}, 8),
    "an unknown dtype": ({"a": GOOD | {"dtype": "F31"}}, 8),
    "dtype is a number": ({"a": GOOD | {"dtype": 32}}, 8),
    "a size that is a text": ({"a": GOOD | {"shape": [2**64, "8"]}}, 8),
    "integers of another size": ({"a": GOOD | {"dtype": "I64"}}, 8),
    "metadata that are no text": ({"a": GOOD, "__metadata__": {"epoch": 1}}, 8),
    "a field twice": (b'{"a": %s}' % TEXT.replace("{", '{"dtype": "F32", ').encode(), 8),
    "NaN in a field": (b'{"a": %s}' % TEXT.replace("}", ', "x": NaN}').encode(), 8),
    "half a character in a name": (b'{"a\\ud800": %s}' % TEXT.encode(), 8),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": GOOD}).encode(), 8),
    "UTF-16": (json.dumps({"a": GOOD}).encode("utf-16"), 8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_safetensors_refuses_is_refused_with_the_file(
    tmp_path: Path, name: str
) -> None:
    header, nbytes = REFUSED[name]
    file = write(tmp_path / "model.safetensors", header, nbytes)
    assert not library_opens(file)
    with pytest.raises(UserError, match=r"model\.safetensors") as caught:
        read_header(file)
    assert "Download it again" in str(caught.value)


@pytest.mark.parametrize("second", [GOOD, SECOND])
def test_a_tensor_that_is_named_twice_is_refused_by_name(tmp_path: Path, second: Any) -> None:
    """The library keeps the last one, if the rest of the file fits it."""
    text = f'{{"a": {TEXT}, "a": {json.dumps(second)}}}'.encode()
    file = write(tmp_path / "model.safetensors", text, 8)
    with pytest.raises(UserError, match="the key 'a' several times"):
        read_header(file)


def test_a_valid_file_is_read_as_before(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": SECOND, "a": GOOD | {"more": 1}}
    entries = read_header(write(tmp_path / "model.safetensors", header, 16))
    assert {name: (e.shape, e.nbytes) for name, e in entries.items()} == {
        "a": ((2,), 8),
        "b": ((2,), 8),
    }
    assert entries["b"].start - entries["a"].start == 8


NUMBERS = st.sampled_from([-8, 0, 1, 2, 4, 8, 12, 16, 2**64, 1.0, 8.0, True, None, "8"])
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "F4", "BOOL", "X", "", None]),
        "shape": st.one_of(st.just([2]), st.lists(NUMBERS, max_size=3)),
        "data_offsets": st.one_of(
            st.sampled_from([[0, 8], [8, 16], [0, 4], [4, 12]]), st.lists(NUMBERS, max_size=3)
        ),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(TENSORS)),
    nbytes=st.sampled_from([0, 8, 16]),
)
def test_any_header_is_opened_only_if_safetensors_opens_it(
    tmp_path_factory: pytest.TempPathFactory, header: Any, nbytes: int
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "any.safetensors", header, nbytes)
    assert we_open(file) <= library_opens(file)


@pytest.mark.usefixtures("full")
def test_the_header_of_100_000_tensors_is_read_in_seconds(tmp_path: Path) -> None:
    header = {
        f"layers.{i}.w": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(100_000)
    }
    file = write(tmp_path / "model.safetensors", header, 400_000)
    before = time.process_time()
    assert len(read_header(file)) == 100_000
    assert time.process_time() - before < 10
