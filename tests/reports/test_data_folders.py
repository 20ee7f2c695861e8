"""Users gave a folder of data, a pipe, or data that changed; and what was read of them."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest

from sparse_lora_dist.data.read_files import read_examples
from sparse_lora_dist.errors import UserError
from tests.fixtures.data_files import jsonl, load, pairs, texts

pytestmark = pytest.mark.usefixtures("own_cache")


def folder(path: Path, **numbers: int) -> Path:
    """A folder with files of some examples each; "__" in a name stands for "/"."""
    for name, number in numbers.items():
        words = [f"{name}{i}" for i in range(number)]
        jsonl(path / f"{name.replace('__', '/').replace('_', '-')}.jsonl", pairs(*words))
    return path


def read(source: Path, **options) -> tuple[int, tuple[str, ...]]:
    """The number of documents, and the files they come from."""
    documents = load(source, **options)
    return len(documents), documents.reading.files


def test_a_file_called_train_beside_others_does_not_hide_them(tmp_path):
    """huggingface/datasets#5021, #7201, #3788"""
    assert read(folder(tmp_path / "a", train=3, extra=5, part2=7)) == (
        15,
        ("extra.jsonl", "part2.jsonl", "train.jsonl"),
    )


@pytest.mark.parametrize("word", ["test", "dev", "val", "eval", "training", "validation"])
def test_a_word_in_one_name_does_not_make_the_others_disappear(tmp_path, word):
    names = {"support": 3, f"ab_{word}_notes": 5, "faq": 7}
    assert read(folder(tmp_path / "a", **names))[0] == 15
    assert read(folder(tmp_path / "b", **{f"{word}__a": 2, "b": 1}))[0] == 3  # a sub-folder


def test_splits_in_all_names_are_kept_apart(tmp_path):
    source = folder(tmp_path / "a", train=3, test=5, validation=2)
    assert read(source, split="train") == (3, ("train.jsonl",))
    assert read(source, split="test") == (5, ("test.jsonl",))
    assert load(source).reading.unread_files == ("test.jsonl", "validation.jsonl")
    source = folder(tmp_path / "b", train__a=3, train__b=1, test__a=5)
    assert read(source, split="train") == (4, ("train/a.jsonl", "train/b.jsonl"))


@pytest.mark.parametrize("name", ["split={}", "Split={}", "[{}]", "{}(1)", "a+{}"])
def test_folders_of_partitions_name_splits(tmp_path, name):
    """As pandas, Spark and pyarrow write tables: split=train/lang=de/0.parquet."""
    for split, number in (("train", 3), ("test", 5)):
        inside = tmp_path / "a" / name.format(split) / "lang=de"
        inside.mkdir(parents=True)
        rows = pairs(*map(str, range(number)))
        datasets.Dataset.from_list(rows).to_parquet(inside / "0.parquet")
    assert read(tmp_path / "a", split="train")[0] == 3
    assert read(tmp_path / "a", split="test")[0] == 5


def test_names_that_leave_it_open_which_files_to_train_on_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"of the splits test, train, and others .*: extra\.jsonl"):
        load(folder(tmp_path / "a", train=3, test=5, extra=1))
    with pytest.raises(UserError, match=r"no file of the split 'train'.*another: test"):
        load(folder(tmp_path / "b", test_1=3, test_2=5))


def test_a_readme_beside_the_data_does_not_hide_a_file(tmp_path):
    source = folder(tmp_path / "a", train=3, extra=5)
    for text in ("# Mine\n", "---\ntags: [a\n---\n", "---\nlicense: mit\n---\n"):
        (source / "README.md").write_text(text)
        assert read(source)[0] == 8
    (source / "a.py").write_text("x = 1")  # a loading script is not run
    assert load(source).reading.unread_files == ("a.py",)


def test_a_readme_that_names_the_data_decides_and_the_rest_is_named(tmp_path):
    source = folder(tmp_path / "a", one=3, two=5)
    configs = (
        "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: one.jsonl}\n"
    )
    (source / "README.md").write_text(f"---\n{configs}---\n")
    assert read(source) == (3, ("one.jsonl",))
    assert load(source).reading.unread_files == ("two.jsonl",)
    with pytest.raises(UserError, match="cannot be read. .*Unknown split"):
        load(source, split="test")


@pytest.mark.parametrize(
    "odd",
    ["\n{}", "  {}", "\ufeff{}", "\r\n{}", '{}"configs":', "{}configs :"],
    ids=["blank line", "blanks", "byte order mark", "CRLF", "quoted", "blank before the colon"],
)
def test_a_readme_is_read_as_datasets_reads_it(tmp_path, odd):
    """The test file was trained on."""
    source = folder(tmp_path / "a", part1=3, part2=5)
    key = odd.partition("{}")[2] or "configs:"
    text = odd.replace(key, "").replace(
        "{}",
        f"---\n{key}\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: part1.jsonl\n  - split: test\n    path: part2.jsonl\n---\n",
    )
    (source / "README.md").write_bytes(text.encode())
    assert read(source) == (3, ("part1.jsonl",))
    (source / "README.md").write_bytes("# Donn\xe9es\n".encode("latin-1"))
    assert read(source)[0] == 8


def test_a_readme_that_leads_out_of_the_folder_is_refused(tmp_path):
    jsonl(tmp_path / "secret.jsonl", pairs("s"))
    source = folder(tmp_path / "a", train=1)
    configs = "configs:\n- config_name: default\n  data_files: ../secret.jsonl\n"
    (source / "README.md").write_text(f"---\n{configs}---\n")
    with pytest.raises(UserError, match=r"README\.md names .*secret\.jsonl, which is not in this"):
        load(source)
    (source / "README.md").write_text("---\nconfigs: [a\n---\n")
    with pytest.raises(UserError, match="cannot be read. ParserError"):
        load(source)


def test_files_that_are_not_read_are_named(tmp_path):
    source = folder(tmp_path / "a", one=1)
    (source / "two.jsonl.gz").write_bytes(b"?")
    (source / "empty.jsonl").write_text("\n")
    (source / ".ipynb_checkpoints").mkdir()
    (source / ".ipynb_checkpoints" / "one.jsonl").write_text('{"prompt": "?", "response": "x"}\n')
    reading = load(source).reading
    assert reading.files == ("one.jsonl",)
    assert "files not read: empty.jsonl, two.jsonl.gz" in reading.report()


def test_a_linked_folder_is_read_and_a_link_to_nowhere_is_refused(tmp_path):
    source, other = folder(tmp_path / "a", one=1), folder(tmp_path / "b", two=2)
    (source / "more").symlink_to(other)
    (source / "loop").symlink_to(source)
    assert read(source)[0] == 3
    (source / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl is no regular file"):
        load(source)


@pytest.mark.timeout(60)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="is a pipe or a device, but data are read several times"):
        load(tmp_path / "p.jsonl")
    source = folder(tmp_path / "a", one=1)
    os.mkfifo(source / "p.jsonl")
    with pytest.raises(UserError, match=r"p\.jsonl is no regular file: a pipe"):
        load(source)


PLACES = {
    "": "is empty. Give the path",
    "~nosuchuser/x.jsonl": "cannot be read. RuntimeError: Could not determine home",
    "/" + "x" * 300 + ".jsonl": "cannot be read. OSError: .*name too long",
    "/dev/null": "is a pipe or a device",
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_are_none_are_one_sentence(place):
    with pytest.raises(UserError, match=PLACES[place]):
        load(place)


def with_the_date_of(new: Path, old: Path) -> None:
    """Replace a file by another one, and keep its date, as tar and rsync do."""
    date = old.stat()
    shutil.copy(new, old)
    os.utime(old, ns=(date.st_atime_ns, date.st_mtime_ns))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_changed_but_kept_its_date_is_read_again(tmp_path, kind):
    for name, words in (("old", "abc"), ("new", "x"), ("same", "xyz")):
        if kind == "jsonl":
            jsonl(tmp_path / f"{name}.jsonl", pairs(*words))
        else:
            datasets.Dataset.from_list(pairs(*words)).to_parquet(tmp_path / f"{name}.parquet")
    path = tmp_path / f"old.{kind}"
    assert texts(load(path)) == ["?a</s>", "?b</s>", "?c</s>"]
    with_the_date_of(tmp_path / f"new.{kind}", path)
    assert texts(load(path)) == ["?x</s>"]
    with_the_date_of(tmp_path / f"same.{kind}", path)
    assert texts(load(path)) == ["?x</s>", "?y</s>", "?z</s>"]


def test_files_of_a_folder_need_not_have_the_same_columns(tmp_path):
    source = tmp_path / "a"
    jsonl(source / "a.jsonl", pairs("one"))
    jsonl(source / "b.jsonl", [one | {"id": 5} for one in pairs("two")])
    jsonl(source / "c.jsonl", [one | {"id": "x"} for one in pairs("three")])
    assert texts(load(source)) == ["?one</s>", "?two</s>", "?three</s>"]
    assert load(source).reading.unread_columns == ("id",)
    source = tmp_path / "b"
    source.mkdir()
    for name, more in (("a", {}), ("b", {"id": 5}), ("c", {"id": "x"})):
        rows = [one | more for one in pairs(name)]
        datasets.Dataset.from_list(rows).to_parquet(source / f"{name}.parquet")
    assert texts(load(source)) == ["?a</s>", "?b</s>", "?c</s>"]
    assert load(source).reading.unread_columns == ("id",)
    source = tmp_path / "c"
    source.mkdir()
    (source / "a.csv").write_text("prompt,response\n?,one\n")
    (source / "b.csv").write_text("response,id,prompt\ntwo,5,?\n")
    assert texts(load(source)) == ["?one</s>", "?two</s>"]


def test_json_files_of_every_shape(tmp_path):
    values = {
        "list": [{"text": "a"}, {"text": "b"}],
        "texts": ["a", "b"],
        "columns": {"text": ["a", "b"], "id": [1, 2]},
    }
    for name, value in values.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value, indent=1))
        assert texts(load(tmp_path / f"{name}.json")) == ["a</s>", "b</s>"]
    (tmp_path / "one.json").write_text(json.dumps({"text": "a", "id": 1}, indent=1))
    assert texts(load(tmp_path / "one.json")) == ["a</s>"]


def test_a_split_is_found_whatever_the_case_of_its_letters(tmp_path):
    """OpenRLHF/OpenRLHF PR #367"""
    for name, text in (("Train.jsonl", "a"), ("TEST.jsonl", "b")):
        jsonl(tmp_path / "data" / name, [{"text": text}])
    for split, file in (("train", "Train.jsonl"), ("test", "TEST.jsonl")):
        source = str(tmp_path / "data")
        examples = read_examples(source, split=split, max_samples=None, flag="--data")
        assert [path.name for path in examples.files] == [file]


def test_a_tsv_with_quoted_cells_is_refused_and_one_with_quotes_in_sentences_is_not(tmp_path):
    """kakaobrain/kor-nlu-datasets PR #8: pandas.DataFrame.to_csv(sep="\\t")"""
    path = tmp_path / "a.tsv"
    path.write_text('text\n"Oh," she said, "no"\n"A word"\n')
    read = {"split": "train", "max_samples": None, "flag": "--data"}
    texts = list(read_examples(str(path), **read).values("text"))
    assert texts == ['"Oh," she said, "no"', '"A word"']
    path.write_text('text\nplain\n"A ""quoted"" word"\n')
    with pytest.raises(UserError, match=r"a.tsv:3: The cell .* is quoted as in a CSV file"):
        read_examples(str(path), **read)
