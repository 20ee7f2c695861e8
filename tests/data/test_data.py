"""Reading: every kind of source gives its examples, and every fault is named with its place."""

import csv
import json
import logging
from pathlib import Path

import datasets
import pytest

from sparse_lora_dist.data import Documents, be_quiet, load_documents
from sparse_lora_dist.errors import UserError
from tests.fixtures.tiny_tokenizer import MARKED, byte_tokenizer

OPTIONS = {
    "text_field": "text",
    "prompt_field": "prompt",
    "response_field": "response",
    "chat_template": None,
    "train_on": "response",
    "sequence_length": 64,
    "max_samples": None,
}
PAIRS = [{"prompt": "2+2=", "response": "4"}, {"prompt": "3+3=", "response": "6"}]
TEXTS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]


pytestmark = pytest.mark.usefixtures("own_cache")


def load(source, tokenizer=None, **options) -> Documents:
    return load_documents(str(source), tokenizer or byte_tokenizer(), **{**OPTIONS, **options})


def texts(documents, tokenizer=None):
    return [(tokenizer or byte_tokenizer()).decode(d.input_ids) for d in documents]


def write_jsonl(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_json(path: Path, records) -> Path:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def write_parquet(path: Path, records) -> Path:
    datasets.Dataset.from_list(records).to_parquet(path)
    return path


def write_csv(path: Path, records) -> Path:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, records[0])
        writer.writeheader()
        writer.writerows(records)
    return path


WRITERS = {"jsonl": write_jsonl, "json": write_json, "parquet": write_parquet, "csv": write_csv}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, kind):
    documents = load(WRITERS[kind](tmp_path / f"a.{kind}", PAIRS))
    assert texts(documents) == ["2+2=4</s>", "3+3=6</s>"]
    assert documents.num_targets == 4


def test_text_files_are_read_whole(tmp_path):
    (tmp_path / "a.txt").write_text("To be\n\nor not\n", encoding="utf-8")
    assert texts(load(tmp_path / "a.txt", text_field="ignored")) == ["To be\n\nor not\n</s>"]


def test_a_csv_stays_text(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"prompt": "a,\nb", "response": r} for r in ("07", "NA")])
    assert texts(load(path)) == ["a,\nb07</s>", "a,\nbNA</s>"]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write_jsonl(tmp_path / "d" / "b.jsonl", TEXTS[1:])
    write_jsonl(tmp_path / "d" / "a.jsonl", TEXTS[:1])
    assert texts(load(tmp_path / "d")) == ["one</s>", "two</s>", "three</s>"]


def test_a_folder_of_plain_texts_has_one_text_a_file(tmp_path):
    for name, text in (("a.txt", "one\ntwo"), ("b.txt", "three")):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
    assert texts(load(tmp_path / "d")) == ["one\ntwo</s>", "three</s>"]


def test_a_folder_like_the_hub_s_gives_the_split_that_was_asked_for(tmp_path):
    write_jsonl(tmp_path / "hub" / "data" / "train-00000-of-00001.jsonl", TEXTS[:2])
    write_jsonl(tmp_path / "hub" / "data" / "test-00000-of-00001.jsonl", TEXTS[2:])
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    (tmp_path / "hub" / "notes.txt").write_text("read me, not train me")
    assert texts(load(tmp_path / "hub")) == ["one</s>", "two</s>"]
    assert texts(load(tmp_path / "hub", split="test")) == ["three</s>"]
    with pytest.raises(UserError, match=r"hub.*Unknown split"):
        load(tmp_path / "hub", split="dev")


def test_a_hub_id_goes_to_the_hub_and_its_answer_comes_back(tmp_path, monkeypatch):
    asked = []
    local = datasets.load_dataset_builder(
        "json", data_files=str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    )

    def hub(name):
        asked.append(name)
        if name == "who/gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'who/gone' doesn't exist")
        return local

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    assert len(load("who/what")) == 3
    with pytest.raises(
        UserError, match="--data who/gone is no file or folder on this machine.*doesn't exist"
    ):
        load("who/gone")
    assert asked == ["who/what", "who/gone"]


def test_max_samples_takes_the_first(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert texts(load(path, max_samples=2)) == ["one</s>", "two</s>"]
    assert len(load(path, max_samples=9)) == 3


def test_a_changed_file_is_read_again(tmp_path):
    assert texts(load(write_jsonl(tmp_path / "a.jsonl", TEXTS[:1]))) == ["one</s>"]
    assert texts(load(write_jsonl(tmp_path / "a.jsonl", TEXTS[1:2]))) == ["two</s>"]


def test_the_cache_knows_the_tokenizer_and_the_options(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS[:1])
    assert texts(load(path)) == ["2+2=4</s>"]
    assert texts(load(path, byte_tokenizer(adds_bos=True))) == ["<s>2+2=4</s>"]
    assert load(path).num_targets == 2
    assert load(path, train_on="all").num_targets == 5
    assert texts(load(path, chat_template=MARKED)) == [
        "<s><|user|>2+2=<|end|>\n<|assistant|>4<|end|>\n"
    ]


def test_file_names_with_brackets_are_names(tmp_path):
    assert len(load(write_jsonl(tmp_path / "run[1].jsonl", TEXTS))) == 3


BROKEN = {
    "cut": (
        '{"text": "a"}\n\n{"text": "b\n{"text": "c"}\n',
        r"a\.jsonl:3: This line is not valid JSON",
    ),
    "last line cut": ('{"text": "a"}\n{"text": ', r"a\.jsonl:2: This line is not valid JSON"),
    "two on a line": (
        '{"text": "a"}\n{"text": "b"}{"text": "c"}\n{"text": null}\n',
        r"a\.jsonl:2: This line is not valid JSON: Extra data",
    ),
    "no object": (
        '{"text": "a"}\n["b"]\n',
        r"a\.jsonl:2: A JSON object .* is needed, but this is list",
    ),
    "null": ('{"text": "a"}\n\n{"text": null}\n', r"a\.jsonl:3: 'text' is missing or null"),
    "missing": ('{"text": "a"}\n{"other": "b"}\n', r"a\.jsonl:2: 'text' is missing or null"),
    "number": ('{"text": "a"}\n{"text": 5}\n', r"a\.jsonl:2: 'text' must be text, got int: 5"),
    "list": ('{"text": "a"}\n{"text": ["b"]}\n', r"a\.jsonl:2: 'text' must be text, got list"),
    "not utf-8": (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: This line is not UTF-8"),
    "empty": ("", r"--data .*a\.jsonl is an empty file"),
    "blank": ("\n \n", r"--data .*a\.jsonl is an empty file"),
    "no column": (
        '{"foo": "a", "bar": 1}\n',
        r"a\.jsonl has neither the column 'messages', nor 'prompt' with 'response', nor 'text'. "
        r"Its columns are: foo, bar. .*--prompt_field .*--text_field",
    ),
    "no role": (
        '{"messages": [{"content": "hi"}]}\n',
        r"a\.jsonl:1: 'role' of message 1 is missing",
    ),
    "content in parts": (
        '{"messages": [{"role": "user", "content": [{"text": "hi"}]}]}\n',
        r"a\.jsonl:1: 'content' of message 1 must be text, got list",
    ),
    "no messages": (
        '{"messages": []}\n',
        r"a\.jsonl:1: 'messages' must be a list of at least one object with role",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_lines_are_named_with_file_and_line(tmp_path, case):
    content, message = BROKEN[case]
    (tmp_path / "a.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.jsonl", byte_tokenizer(template=MARKED))


def test_the_second_file_of_a_folder_is_named_with_its_own_line(tmp_path):
    write_jsonl(tmp_path / "d" / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "d" / "b.jsonl", [{"text": "fine"}, {"text": None}])
    with pytest.raises(UserError, match=r"b\.jsonl:2: 'text' is missing or null"):
        load(tmp_path / "d")


def test_other_kinds_name_the_example(tmp_path):
    records = [{"text": "a"}, {"text": None}]
    for name, write in (("a.json", write_json), ("b.parquet", write_parquet)):
        with pytest.raises(UserError, match=rf"{name}, example 2: 'text' is missing or null"):
            load(write(tmp_path / name, records))


def test_broken_files_of_other_kinds(tmp_path):
    files = {
        "a.json": (b'[{"text": "a"},\n{"text" "b"}]', r"a\.json:2: This line is not valid JSON"),
        "b.json": (b"[]", r"b\.json.* It is empty"),
        "c.csv": (
            b"prompt,response\nhello, world,x\n",
            r"c\.csv:2: This line has 3 cells, but .* has 2",
        ),
        "d.csv": (b"prompt,response\n", r"d\.csv.* It is empty"),
        "e.parquet": (b"PAR1 and no more", r"e\.parquet cannot be read"),
        "f.docx": (b"?", r"f\.docx is a file of an unknown kind: \.docx\. .* kinds: \.jsonl"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)


def test_what_is_not_there_and_what_is_mixed(tmp_path):
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "mixed" / "a.jsonl", TEXTS)
    write_csv(tmp_path / "mixed" / "b.csv", TEXTS)
    faults = {
        "gone.jsonl": "does not exist",
        "empty": "is a folder without data files",
        "mixed": r"files of several kinds: \.csv, \.jsonl",
    }
    for name, message in faults.items():
        with pytest.raises(UserError, match=rf"--eval_data .*{name}.*{message}"):
            load(tmp_path / name, flag="--eval_data")


def test_be_quiet_leaves_nothing_on_the_screen(tmp_path, capfd):
    before = datasets.logging.get_verbosity()
    datasets.enable_progress_bars()
    be_quiet()
    try:
        load(write_jsonl(tmp_path / "a.jsonl", TEXTS))
        assert datasets.logging.get_verbosity() == logging.CRITICAL
    finally:
        datasets.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")
