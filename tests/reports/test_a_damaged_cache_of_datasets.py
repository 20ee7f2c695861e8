"""A file in the cache of ``datasets`` that a full disk or a kill cut short: the data are not
blamed."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from sparse_lora_dist.data.examples import Examples, from_cache
from sparse_lora_dist.data.read_files import read_examples
from sparse_lora_dist.data.tokens import tokenise
from sparse_lora_dist.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def data_file(folder: Path, suffix: str) -> str:
    file = folder / f"mine{suffix}"
    texts = ["one", "two", "three"] * 50
    if suffix == ".parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def read(source: str) -> Examples:
    return read_examples(source, split="train", max_samples=None, flag="--data")


def tokens(examples: Examples) -> datasets.Dataset:
    features = datasets.Features({"n": datasets.Value("int64")})
    rows = lambda record: [{"n": len(record["text"])}] * 40  # noqa: E731
    return tokenise(examples, ["text"], rows, ("key",), features)


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def check_words(said: str, cache: Path) -> None:
    assert said.startswith(f"The cache {cache}") and "remove this folder" in said
    assert "is damaged" in said and "mine" not in said and "--data" not in said


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".jsonl", "*.arrow"), (".jsonl", "dataset_info.json"), (".parquet", "*.arrow")],
)
def test_a_table_that_is_cut_short_names_the_cache_and_what_to_remove(
    cache: Path, tmp_path: Path, suffix: str, name: str, share: float
) -> None:
    source = data_file(tmp_path, suffix)
    assert len(read(source).table) == 150
    (file,) = cache.rglob(name)
    cut(file, share)
    with pytest.raises(UserError) as caught:
        read(source)
    check_words(str(caught.value), cache)
    named = Path(str(caught.value).removeprefix("The cache ").partition(" of the package")[0])
    assert file.is_relative_to(named) and named != cache
    shutil.rmtree(named)
    assert len(read(source).table) == 150


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_tokens_that_are_cut_short_name_the_cache(
    cache: Path, tmp_path: Path, share: float
) -> None:
    examples = read(data_file(tmp_path, ".jsonl"))
    assert len(tokens(examples)) == 6000
    (file,) = cache.rglob("cache-*.arrow")
    cut(file, share)
    with pytest.raises(UserError) as caught:
        tokens(examples)
    check_words(str(caught.value), cache)


def test_a_wrong_example_is_still_the_users(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        read(str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize(
    "error", [UserError("line 3"), OSError(28, "No space left"), MemoryError()]
)
def test_other_causes_keep_their_words(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, from_cache("/cache"):
        raise error
    assert caught.value is error
