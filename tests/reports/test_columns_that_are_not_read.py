"""Columns that are not read do not matter, and tokenizers whose files cut or pad change nothing."""

from pathlib import Path

import datasets
import pytest

from tests.fixtures.data_files import assistant, jsonl, learned, load, texts, user
from tests.fixtures.tiny_tokenizer import byte_tokenizer
from tests.reports.test_marks_tables_and_answers_of_other_kinds import END, OTHERS, TURN

MARKED = OTHERS + "<|assistant|>" + TURN + END
PLAIN = OTHERS + "<|assistant|>{{ m.content }}<|end|>" + END
CHAT = [{"messages": [user("what is it"), assistant("it is what it is, and more than that")]}]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        (datasets.Image(), {"bytes": b"no image", "path": None}),
        (datasets.Audio(), {"bytes": b"no sound", "path": "a.wav"}),
        (datasets.Video(), {"bytes": b"no video", "path": None}),
        (datasets.Pdf(), {"bytes": b"no pages", "path": None}),
    ],
    ids=["image", "sound", "video", "pdf"],
)
def test_images_and_sounds_beside_texts_are_not_decoded(
    tmp_path: Path, feature: object, value: dict[str, object]
) -> None:
    undecoded = {
        key: datasets.Value(kind) for key, kind in (("bytes", "binary"), ("path", "string"))
    }
    table = datasets.Dataset.from_dict(
        {"text": ["one", "two"], "beside": [value] * 2},
        features=datasets.Features({"text": datasets.Value("string"), "beside": undecoded}),
    )
    file = tmp_path / "a.parquet"
    table.cast_column("beside", feature).to_parquet(str(file))
    documents = load(file, byte_tokenizer())
    assert [text.removesuffix("</s>") for text in texts(documents, byte_tokenizer())] == [
        "one",
        "two",
    ]


def test_times_of_an_unknown_zone_beside_texts_are_not_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    times = pa.array([0, 1], pa.timestamp("s", tz="Mars/Olympus"))
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", "two"], "when": times}), file)
    assert len(load(file, byte_tokenizer())) == 2


@pytest.mark.parametrize("template", [MARKED, PLAIN])
@pytest.mark.parametrize("how", ["cuts", "pads"])
def test_a_tokenizer_whose_file_cuts_or_pads_gives_the_same_tokens(
    tmp_path: Path, template: str | None, how: str
) -> None:
    file = jsonl(tmp_path / "a.jsonl", CHAT)
    plain, other = byte_tokenizer(template=template), byte_tokenizer(template=template)
    if how == "cuts":
        other.backend_tokenizer.enable_truncation(max_length=8)
    else:
        other.backend_tokenizer.enable_padding(length=256, direction="left")
    wanted, found = (load(file, tokenizer) for tokenizer in (plain, other))
    assert texts(found, other) == texts(wanted, plain)
    assert learned(found, other) == learned(wanted, plain) != []


@pytest.mark.parametrize("cell", ['"one\ntwo"', '"a\tb"', '"a"'])
def test_quotes_of_a_tsv_table_are_pointed_out(tmp_path: Path, cell: str) -> None:
    """As pandas writes cells with line breaks and tabs, which are two cells here."""
    file = tmp_path / "a.tsv"
    file.write_text(f"text\tmore\n{cell}\tx\nplain\ty\n")
    if cell.count("\t"):
        with pytest.raises(Exception, match="columns|cells"):
            load(file, byte_tokenizer())
        return
    if "\n" in cell:
        file.write_text(f"text\n{cell}\nplain\n")
    reading = load(file, byte_tokenizer()).reading
    assert any("stand in quotes" in note for note in reading.notes)


SWITCH = "{% if thinking is not defined %}{% set thinking = false %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        (SWITCH + PLAIN, ("messages.thinking",)),  # DeepSeek V3.1
        (PLAIN.replace("{{ m.content }}", "{{ m.thinking }}{{ m.content }}"), ()),
        ("{# m.thinking #}" + PLAIN, ("messages.thinking",)),
    ],
    ids=["variable", "rendered", "comment"],
)
def test_a_key_that_a_template_has_as_a_variable_is_not_read(
    tmp_path: Path, template: str, unread: tuple[str, ...]
) -> None:
    chat = [user("what"), assistant("it is") | {"thinking": "a long thought"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    assert load(path, byte_tokenizer(template=template)).reading.unread_columns == unread
