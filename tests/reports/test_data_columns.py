"""Users had columns that are not used, columns that decide, dates, labels, and null lines."""

import json
import re
from datetime import datetime

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data import load_labelled, read_classes
from sparse_lora_dist.data.fields import ExampleError
from sparse_lora_dist.data.labels import label_of
from sparse_lora_dist.data.reading import shown
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.eval_metrics import METRICS
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.questions import Encoder
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.training.feed import given
from tests.fixtures.data_files import assistant, jsonl, learned, load, pairs, texts, user
from tests.fixtures.tiny_tokenizer import MARKED, PLAIN, byte_tokenizer

CHAT = [user("a"), assistant("b")]


pytestmark = pytest.mark.usefixtures("own_cache")


MANY = 2000
UNUSED = {
    "an id that becomes text late": lambda i: {"id": i if i < MANY - 1 else "x"},
    "null, then an object": lambda i: {"meta": None if i < MANY - 1 else {"source": "x"}},
    "one more column late": lambda i: {"late": 1} if i == MANY - 1 else {},
    "an object, then a list": lambda i: {"meta": {"a": 1} if i else [1]},
    "a number beyond 64 bits": lambda i: {"id": 10**30},
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_column_that_is_not_used_does_not_decide_whether_a_file_is_read(tmp_path, case):
    """huggingface/datasets#7169, #7222, #5596"""
    rows = [one | UNUSED[case](i) for i, one in enumerate(pairs("b") * MANY)]
    documents = load(jsonl(tmp_path / "a.jsonl", rows))
    assert len(documents) == MANY
    assert documents.reading.columns == ("prompt", "response")
    assert len(documents.reading.unread_columns) == 1


@pytest.mark.parametrize(
    "dates", [["2024-01-15", "2023-02-16"], ["2024-01-15 10:00:00", "2023-02-16T09:00:00Z"]]
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_answers_that_are_all_dates_are_the_text_of_the_file(tmp_path, dates, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text("prompt,response\n" + "".join(f"when,{date}\n" for date in dates))
    else:
        rows = [{"prompt": "when", "response": date} for date in dates]
        path.write_text(json.dumps(rows)) if kind == "json" else jsonl(path, rows)
    assert learned(load(path)) == [f"{date}</s>" for date in dates]


def test_a_text_field_that_was_given_wins(tmp_path):
    """huggingface/alignment-handbook#67"""
    row = {"prompt": "short", "response": "x", "body": "the whole text", "messages": CHAT}
    path = jsonl(tmp_path / "a.jsonl", [row])
    documents = load(path, byte_tokenizer(template=PLAIN), text_field="body")
    assert texts(documents) == ["the whole text</s>"]
    assert documents.reading.unread_columns == ("prompt", "response", "messages")


def test_prompt_and_response_fields_that_were_given_win(tmp_path):
    row = {"question": "a dog", "answer": "the cat", "messages": CHAT, "text": "t"}
    path = jsonl(tmp_path / "a.jsonl", [row])
    options = {"prompt_field": "question", "response_field": "answer"}
    assert texts(load(path, **options)) == ["a dogthe cat</s>"]
    with pytest.raises(
        UserError, match="no column 'response', which --prompt_field question needs"
    ):
        load(path, prompt_field="question")
    with pytest.raises(UserError, match="no column 'body', which --text_field body needs"):
        load(path, text_field="body")
    with pytest.raises(UserError, match="--text_field text2 is for plain text, but --prompt_field"):
        load(path, text_field="text2", **options)


def test_columns_that_are_not_read_are_named_on_the_screen(tmp_path):
    """hiyouga/LlamaFactory#4152, ConardLi/easy-dataset#549, fw-ai/cookbook#387"""
    row = {"system": "one word", "prompt": "a dog", "response": "the cat"}
    report = load(jsonl(tmp_path / "a.jsonl", [row])).reading.report()
    assert "columns: prompt, response; columns not read: system" in report
    row = {"instruction": "number", "input": "one two", "output": "three"}
    options = {"prompt_field": "instruction", "response_field": "output"}
    report = load(jsonl(tmp_path / "b.jsonl", [row]), **options).reading.report()
    assert "columns not read: input" in report
    row = {"messages": [user("a"), assistant("red", weight=0), user("b"), assistant("old")]}
    for path in (jsonl(tmp_path / "c.jsonl", [row]), tmp_path / "c.parquet"):
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([row]).to_parquet(path)
        report = load(path, byte_tokenizer(template=PLAIN)).reading.report()
        assert "columns not read: messages.weight" in report


def test_columns_are_all_named_as_read_where_none_is_left_out(tmp_path):
    report = load(jsonl(tmp_path / "a.jsonl", pairs("b"))).reading.report()
    assert "columns not read: none" in report
    assert "an answer ends with: </s>" in report


def test_options_that_are_not_used_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("to be")
    options = {"text_field": "body", "prompt_field": "q", "chat_template": PLAIN}
    options["column_names"] = ("a",)
    report = load(tmp_path / "a.txt", **options).reading.report()
    named = "--text_field, --prompt_field, --chat_template, --column_names"
    assert report.endswith(f"; options not used: {named}")


def test_options_of_another_task_are_named(tmp_path):
    data = DataConfig(label_field="class", prompt_field="q", chat_template="t.jinja")
    named = {task: given(data, TASKS[task].other_options) for task in TASKS}
    assert named["causal_lm"] == {"--label_field": True}
    assert [option for option, is_given in named["seq_cls"].items() if is_given] == [
        "--prompt_field",
        "--chat_template",
    ]


def test_a_date_of_parquet_is_no_text(tmp_path):
    (tmp_path / "d").mkdir()
    for day, more in ((1, {}), (2, {"id": 1})):
        row = {"prompt": "when", "response": datetime(2024, 1, day), **more}
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "d" / f"{day}.parquet")
    for source, kind in ((tmp_path / "d" / "1.parquet", "date"), (tmp_path / "d", "dict")):
        message = rf"1\.parquet, example 1: 'response' must be text, got {kind}"
        with pytest.raises(UserError, match=message):
            load(source)


def test_examples_that_each_have_a_column_of_their_own_are_read(tmp_path):
    rows = [one | {f"id{i}": i} for i, one in enumerate(pairs("b") * MANY)]
    reading = load(jsonl(tmp_path / "a.jsonl", rows)).reading
    assert len(reading.unread_columns) == 1001
    assert reading.report().count("id") == 6


def test_odd_names_do_not_reach_the_terminal(tmp_path):
    report = load(jsonl(tmp_path / "a.jsonl", [pairs("b")[0] | {"\x1b[2J": 1}])).reading.report()
    assert r"'\x1b[2J'" in report and "\x1b" not in report


NULLS = {
    "only null": ("null\n" * 3, r"a\.jsonl:1: .* 3 lines are null. This is the first"),
    "one null": ('{"text": "a"}\n\nnull\n', r"a\.jsonl:3: .* but this is null\. jq prints null"),
    "nulls last": (
        '{"text": "a"}\nnull\nnull\n',
        r"a\.jsonl:2: .* 2 lines are null. This is the first",
    ),
    "deep": ('{"text": ' + "[" * 100_000, r"a\.jsonl:1: This line cannot be read: RecursionError"),
    "digits": ('{"text": ' + "1" * 5000 + "}", r"a\.jsonl:1: .*got dict"),
    "a key twice": (
        '{"text": "a"}\n{"text": "b", "text": "c"}\n',
        r"a\.jsonl:2: 'text' must be text, got dict: \{'key several times': 'text'\}",
    ),
    "half a letter": (
        '{"text": "a"}\n{"text": "\\ud800"}',
        r"a\.jsonl:2: 'text' has half of a surrogate pair.*ud800",
    ),
}


@pytest.mark.parametrize("case", NULLS)
def test_lines_that_no_reader_takes_are_one_sentence(tmp_path, case):
    content, message = NULLS[case]
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.jsonl")


HALVES = {
    "prompt": ({"prompt": "a\ud800", "response": "b"}, "'prompt'"),
    "response": ({"prompt": "a", "response": "b\udfff c"}, "'response'"),
    "role": ({"messages": [{"role": "\ud800", "content": "a"}]}, "'role' of message 1"),
    "call": ({"messages": [user("a"), assistant("", tool_calls=["\ud800"])]}, "Message 2"),
    "tools": ({"messages": [user("a"), assistant("b")], "tools": ["\ud800"]}, "'tools'"),
    "tools as text": ({"prompt": "", "response": "", "tools": '["\\ud800"]'}, "'tools'"),
}


@pytest.mark.parametrize("case", HALVES)
def test_half_of_a_surrogate_pair_is_named_with_its_place(tmp_path, case):
    """The Unicode standard, D76: it is the code of no character."""
    row, name = HALVES[case]
    good = {"prompt": "\U0001f600", "response": "\U0001f600"}
    rows = [{"messages": [user("\U0001f600"), assistant("b")]} if "messages" in row else good, row]
    path = jsonl(tmp_path / "a.jsonl", rows)
    template = PLAIN + "{% if tools %}{{ tools }}{% endif %}"
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {name} has half of a surrogate pair.*\\ud"):
        load(path, byte_tokenizer(template=template))


def test_half_of_a_surrogate_pair_in_a_label_a_choice_or_a_right_answer(tmp_path):
    said = r"a\.jsonl:1: {} has half of a surrogate pair"
    with pytest.raises(UserError, match=said.format("The label")):
        classes(tmp_path / "a.jsonl", ["\ud800", "b"])
    path = jsonl(tmp_path / "c" / "a.jsonl", [{"prompt": "p", "response": "\ud800"}])
    encoder = Encoder(tokenizer=byte_tokenizer(), template=None, data=DataConfig())
    with pytest.raises(UserError, match=said.format("'response'")):
        METRICS["exact"].items(encoder, Table.read(str(path), DataConfig(), None), None)
    path = jsonl(
        tmp_path / "b" / "a.jsonl", [{"prompt": "p", "choices": ["a", "\ud800"], "answer": 0}]
    )
    with pytest.raises(UserError, match=said.format("a choice")):
        METRICS["choice"].items(encoder, Table.read(str(path), DataConfig(), None), None)


@pytest.mark.parametrize("name", ["text", "id"])
def test_a_parquet_file_with_a_name_twice_is_refused(tmp_path, name):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    table = pa.table(columns, names=["text", name, name])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet has several columns .* '{name}'.*own\.$"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize("unread", ['"id": 1, "id": 2', '"meta": {"x": 1, "x": [2]}'])
def test_a_key_that_stands_twice_is_refused_only_where_it_is_read(tmp_path, unread):
    row = '{"prompt": "a", "response": "b", ' + unread + "}"
    for name, content in {"a.jsonl": f"{row}\n{row}\n", "a.json": f"[{row},\n{row}]"}.items():
        (tmp_path / name).write_text(content)
        documents = load(tmp_path / name)
        assert len(documents) == 2 and len(documents.reading.unread_columns) == 1
    twice = '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'
    (tmp_path / "b.jsonl").write_text(twice)
    with pytest.raises(UserError, match=r"b\.jsonl:1: .* got \{'key several times': 'role'\}"):
        load(tmp_path / "b.jsonl", byte_tokenizer(template=PLAIN))


def test_a_table_with_a_name_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match=r"a\.csv has several columns with the name 'text'"):
        load(tmp_path / "a.csv")


def classes(path, labels):
    jsonl(path, [{"text": "a", "label": label} for label in labels])
    return read_classes(str(path), label_field="label", column_names=(), flag="--data")


LABELS = {
    "mixed": ([0, "a"], r"l\.jsonl:2: Its label 'a' is str, but an earlier label 0 is int"),
    "lists": ([[0], [1]], r"l\.jsonl:1: The label must be a whole number or text, got list"),
    "fractions": ([0.5, 1.5], r"l\.jsonl:1: The label must be a whole number or text, got float"),
    "a missing one": ([0, 1, None], r"l\.jsonl:3: The label must be a whole number or text"),
    "unknown": ([0, 1, -1, 2], r"-1 marks examples whose label is unknown"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_no_classes_are_refused_with_their_line(tmp_path, case):
    labels, message = LABELS[case]
    with pytest.raises(UserError, match=message):
        classes(tmp_path / "l.jsonl", labels)


def test_odd_labels_are_names(tmp_path):
    assert classes(tmp_path / "a.jsonl", ["--5", "1"]) == ["1", "--5"]
    assert classes(tmp_path / "b.jsonl", [10, 9, -1]) == ["-1", "9", "10"]


def test_a_label_of_minus_one_is_pointed_out(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": i, "id": 1} for i in (-1, 0, 1)])
    documents = load_classes(path, byte_tokenizer(), "-1", "0", "1")
    assert "the label -1 is a class of its own" in documents.reading.notes[0]
    assert "columns: text, label; columns not read: id" in documents.reading.report()


def test_a_chat_without_an_assistant_names_its_roles(tmp_path):
    rows = [{"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}]
    for template in (MARKED, PLAIN):
        with pytest.raises(UserError, match="roles human, gpt, but the loss is on .* 'assistant'"):
            load(jsonl(tmp_path / "a.jsonl", rows), byte_tokenizer(template=template))


def test_labels_that_look_the_same_and_a_column_with_two_roles_are_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": v} for v in ("0", " 0", "1")])
    with pytest.raises(UserError, match="the labels '0' and ' 0', which are one label written"):
        read_classes(str(path), label_field="label", column_names=(), flag="--data")
    with pytest.raises(UserError, match="name the column 'label' twice"):
        load_labelled(
            str(path), byte_tokenizer(), text_fields=["label"], label_field="label",
            column_names=(), classes=["0", "1"], segments=False, sequence_length=8,
            max_samples=None,
        )  # fmt: skip


def test_names_of_data_are_shown_without_codes_that_a_terminal_obeys():
    assert shown(["a\x1b[31m"]) == repr("a\x1b[31m") and len(shown(["x" * 9999])) < 250


def test_an_unread_column_of_a_type_that_datasets_lacks_does_not_matter(tmp_path):
    labels = pa.array([[("k", 1)], [("z", 2)]], pa.map_(pa.string(), pa.int64()))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["x", "y"], "m": labels}), path)
    tokenizer = byte_tokenizer(template=PLAIN)
    documents = load(path, tokenizer)
    assert learned(documents, tokenizer) == ["x<|end|>\n", "y<|end|>\n"]
    assert documents.reading.unread_columns == ("m",)


def test_words_of_which_the_tokenizer_leaves_out_letters_are_named(tmp_path):
    """huggingface/tokenizers#517: a tokenizer without unk drops what it has no token for."""
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abco. <s>")}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<s>")
    chat = {"messages": [user("ab"), assistant("cß7 ca ß.")]}
    source = jsonl(tmp_path / "chats.jsonl", [chat])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert cut(load(source, tokenizer, chat_template=template)) == ["cß7, ß."]
    assert cut(load(source, chat_template=template)) == []
    assert cut(load(jsonl(tmp_path / "pairs.jsonl", pairs("aßb")), tokenizer)) == ["?, aßb"]
    plain = jsonl(tmp_path / "plain.jsonl", [{"text": "ab"}, {"text": "aßb a\u0301"}])
    assert cut(load(plain, tokenizer)) == ["aßb"]
    labelled = jsonl(tmp_path / "labelled.jsonl", [{"text": "aßb", "label": "x"}] * 2)
    assert cut(load_classes(labelled, tokenizer, "x")) == ["aßb"]


def cut(documents):
    notes = " ".join(documents.reading.notes)
    return re.findall(r"leaves out letters of some words \((.*?)\)", notes)


def load_classes(path, tokenizer, *classes):
    return load_labelled(
        str(path),
        tokenizer,
        text_fields=("text",),
        label_field="label",
        column_names=(),
        classes=classes,
        segments=False,
        sequence_length=64,
        max_samples=None,
    )


@pytest.mark.parametrize("label", ["", " ", "\t"])
def test_a_label_of_blanks_is_empty(label: str) -> None:
    with pytest.raises(ExampleError, match="The label of this example is empty"):
        label_of(label, None)
