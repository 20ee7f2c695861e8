"""Marks of templates in odd places, tables that were joined, and answers of several kinds."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import AddedToken, normalizers

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.data.fields import ExampleError
from sparse_lora_dist.data.labels import label_of, read_classes
from sparse_lora_dist.data.read_files import read_examples
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.questions import Encoder
from sparse_lora_dist.training.feed import rows_of
from tests.fixtures.data_files import assistant, jsonl, learned, load, pairs, texts, user
from tests.fixtures.tiny_tokenizer import PLAIN, byte_tokenizer

GIVEN = [{"messages": [user("what"), assistant("it is é"), user("and"), assistant(" 🙂 x ")]}]
"""Two answers with letters of several bytes, one with white space around it."""
TURN = "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
OTHERS = "{% for m in messages %}{% if m.role != 'assistant' %}<|user|>{{ m.content }}{% else %}"
END = "{% endif %}{% endfor %}"
WITH_MARKS = {
    "plain": OTHERS + "<|assistant|>" + TURN + END,
    "in a set block": OTHERS
    + "{% set x %}" + TURN + "{% endset %}<|assistant|>{{ x }}" + END,
    "in a call": "{% macro w() %}<|assistant|>{{ caller() }}{% endmacro %}" + OTHERS
    + "{% call w() %}" + TURN + "{% endcall %}" + END,
    "in a macro": "{% macro w(m) %}<|assistant|>" + TURN + "{% endmacro %}" + OTHERS
    + "{{ w(m) }}" + END,
    "all in a set block, then trimmed": "{% set x %}  \n" + OTHERS + "<|assistant|>" + TURN + END
    + "{% endset %}<s>{{ x | trim }}",
    "with dashes and lines": OTHERS + "<|assistant|>\n  {%- generation -%}\n  {{ m.content }}"
    "<|end|>\n  {%- endgeneration -%}  \n" + END,
    "with plus signs": OTHERS + "<|assistant|>" + TURN.replace("{% gen", "{%+ gen").replace(
        "{% end", "{%+ end") + END,
    "with plus signs at the ends": OTHERS + "<|assistant|>" + TURN.replace(" %}", " +%}") + END,
    "with lines that jinja strips": OTHERS + "<|assistant|>{% generation %}\n{{ m.content }}"
    "<|end|>{% if true %}\n   {% endif %}\n   {% endgeneration %}\n" + END,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("case", WITH_MARKS)
def test_what_stands_between_marks_is_learned_wherever_they_stand(
    tmp_path: Path, case: str, trims: bool
) -> None:
    """transformers counts in the block that is rendered, and takes offsets without spaces."""
    tokenizer = byte_tokenizer(template=WITH_MARKS[case], trim_offsets=trims)
    documents = load(jsonl(tmp_path / "a.jsonl", GIVEN), tokenizer)
    whole = tokenizer.apply_chat_template(GIVEN[0]["messages"], tokenize=False)
    assert texts(documents, tokenizer) == [whole]
    assert learned(documents, tokenizer) == ["it is é<|end|> 🙂 x <|end|>"]


@pytest.mark.parametrize(
    "template",
    [
        OTHERS + "{% set x %}" + TURN + "{% endset %}{{ x | trim }}" + END,
        OTHERS + "{% set x %}" + TURN + "{% endset %}{{ x | length }}" + END,
        "{{ range(10 ** 5) | random }}" + OTHERS + TURN + END,
    ],
    ids=["trimmed inside", "counted", "another each time"],
)
def test_marks_that_cannot_be_followed_are_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: What stands between the {% generation %}"):
        load(jsonl(tmp_path / "a.jsonl", GIVEN), byte_tokenizer(template=template))


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("A", "A<|end|>"), (" A", "A<|end|>"), ("\nA \n", "A<|end|>"), (" ", "<|end|>")],
)
@pytest.mark.parametrize("marked", [True, False])
def test_special_tokens_that_take_white_space_stay_what_they_are(
    tmp_path: Path, answer: str, wanted: str, marked: bool
) -> None:
    """Phi-3's <|assistant|> takes what follows it, and here <|end|> what comes before it."""
    template = OTHERS + "<|assistant|>\n" + TURN + END
    template += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    if not marked:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = byte_tokenizer(template=template)
    tokenizer.backend_tokenizer.add_special_tokens(
        [
            AddedToken("<|assistant|>", special=True, rstrip=True),
            AddedToken("<|end|>", special=True, lstrip=True),
        ]
    )
    documents = load(jsonl(tmp_path / "a.jsonl", pairs(answer)), tokenizer)
    assert learned(documents, tokenizer) == [wanted]


def test_an_end_outside_of_the_marks_that_takes_white_space_of_the_answer_is_not_learned(
    tmp_path: Path,
) -> None:
    turn = "{% generation %}{{ m.content }}{% endgeneration %}<|end|>"
    tokenizer = byte_tokenizer(template=OTHERS + "<|assistant|>" + turn + END)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|end|>", lstrip=True)])
    documents = load(jsonl(tmp_path / "a.jsonl", pairs("A", "A \n")), tokenizer)
    assert learned(documents, tokenizer) == ["A", "A"]


def test_marks_in_a_comment_are_none(tmp_path: Path) -> None:
    """Where a template has none, prefixes find the answers."""
    turn = "<|{{ m.role }}|>{{ m.content }}<|end|>"
    template = "{# {% generation %} #}{% for m in messages %}" + turn + "{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = byte_tokenizer(template=template)
    documents = load(jsonl(tmp_path / "a.jsonl", GIVEN), tokenizer)
    assert learned(documents, tokenizer) == ["it is é<|end|> 🙂 x <|end|>"]


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        ("for m in messages[-2:]", ["role user", "answer as it is"]),
        ("for m in messages if m.role != 'system'", ["role system"]),
        ("for m in messages", []),
    ],
)
def test_messages_that_the_template_drops_are_said(
    tmp_path: Path, loop: str, said: list[str]
) -> None:
    """mistralai: the system prompt stands before the last question only."""
    template = f"{{% {loop} %}}<|{{{{ m.role }}}}|>{TURN}{{% endfor %}}"
    chat = [{"role": "system", "content": "be good"}, *GIVEN[0]["messages"]]
    rows = [{"messages": chat if "system" in loop else chat[1:]}]
    reading = load(jsonl(tmp_path / "a.jsonl", rows), byte_tokenizer(template=template)).reading
    notes = [note for note in reading.notes if "leaves out" in note]
    assert bool(notes) == bool(said) and all(word in notes[0] for word in said)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("Prompt,Response", "names of --column_names, in other letters"),
        ("RESPONSE, prompt", "names of --column_names, in another order"),
        ("Prompt,answer", "the name 'prompt' in the column of that name"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_header_in_other_letters_is_no_example(
    tmp_path: Path, header: str, said: str, suffix: str
) -> None:
    file = tmp_path / f"a{suffix}"
    table = f"{header}\na,b\n"
    file.write_text(table if suffix == ".csv" else table.replace(",", "\t"))
    with pytest.raises(UserError, match=said):
        load(file, column_names=("prompt", "response"))
    file.write_text("a,prompt\n" if suffix == ".csv" else "a\tprompt\n")  # in another column
    assert len(load(file, column_names=("prompt", "response"))) == 1


def test_a_header_in_the_middle_or_with_names_of_its_own_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,response\na,b\nprompt,response\nc,d\n")
    with pytest.raises(UserError, match=r"a\.csv:3: This line has the names of the columns"):
        load(file)
    file.write_text("prompt,response\na,b\nc,d\n")
    with pytest.raises(UserError, match="It is a header: leave --column_names out"):
        load(file, column_names=("prompt", "response"))
    assert len(load(file)) == 2
    file.write_text("text\ntext\nother\n")  # in one column, a row may have this word
    assert len(load(file, prompt_field="prompt")) == 2


def test_cells_in_quotes_of_a_tsv_file_are_said(tmp_path: Path) -> None:
    """Excel quotes cells with a comma there too."""
    for cell, said in (('"Well, it is 2"', True), ("Well, it is 2", False)):
        file = tmp_path / f"{said}.tsv"
        file.write_text(f"prompt\tresponse\n1 + 1?\t{cell}\n")
        notes = load(file).reading.notes
        assert bool([n for n in notes if "stand in quotes: 1 in the first rows" in n]) == said


def test_parquet_files_without_rows_and_columns_that_cannot_be_read(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "response": ["b"]})
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(table.append_column("other", bad), tmp_path / "a.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    (document,) = load(tmp_path)
    assert learned([document]) == ["b</s>"]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="It is empty. Give data with at least one example"):
        load(tmp_path / "b.parquet")


def test_each_parquet_file_has_its_own_names_of_classes(tmp_path: Path) -> None:
    for name, order in (("a", ["neg", "pos"]), ("b", ["pos", "neg"])):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=order)}
        )
        rows = {"text": ["it"] * 3, "label": [order.index("neg")] * 2 + [order.index("pos")]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    examples = read_examples(
        str(tmp_path), split="train", max_samples=None, flag="--data", column_names=()
    )
    labels = [label_of(v, examples.feature("label")) for v in examples.values("label")]
    assert labels == ["neg", "neg", "pos"] * 2
    with pytest.raises(ExampleError, match="class 2, but the column declares the classes 0 to 1"):
        label_of(2, datasets.ClassLabel(names=["a", "b"]))


def test_labels_that_look_the_same_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in ("caf\u00e9", "cafe\u0301")]
    source = str(jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match="one label written in two ways"):
        read_classes(source, label_field="label", column_names=(), flag="--data")


NUMBERS = ["2", "0", "3", "1"]
WORDS = ["Rome", "Oslo", "A", "Bern"]


@pytest.mark.parametrize(
    ("rows", "places"),
    [
        ([("1", NUMBERS), ("2", WORDS)], [1, 2]),  # indices: the second is no text
        ([("1", NUMBERS), ("Oslo", WORDS), ("3", WORDS)], "two kinds"),
        ([("1", NUMBERS), ("Oslo", WORDS)], [3, 1]),
        ([("1", NUMBERS), ("2", NUMBERS)], [3, 0]),  # texts: all are
        ([("B", WORDS), ("A", WORDS)], [1, 0]),  # letters: the first is no text
        ([("A", WORDS), ("Oslo", WORDS)], [2, 1]),
        ([(1, NUMBERS), (2, WORDS)], [1, 2]),
        ([("Oslo", WORDS), ("B", WORDS), (3, NUMBERS)], [1, 1, 3]),
    ],
)
def test_answers_are_texts_letters_or_indices_in_the_whole_file(
    tmp_path: Path, rows: list[tuple[Any, list[str]]], places: list[int] | str
) -> None:
    """HellaSwag writes indices as text."""
    lines = [{"prompt": "?", "choices": choices, "answer": answer} for answer, choices in rows]
    table = Table.read(str(jsonl(tmp_path / "a.jsonl", lines)), DataConfig(), None)
    if isinstance(places, str):
        with pytest.raises(UserError, match=r"a\.jsonl:1: The answer can be read as a text and"):
            table.map(lambda table, record: table.choices(record))
    else:
        assert table.map(lambda table, record: table.choices(record)[1]) == places


def test_a_choice_without_tokens_of_its_own_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_tokenizer(template=template.replace("\n", ""))
    encoder = Encoder(tokenizer=tokenizer, data=DataConfig(), template=tokenizer.chat_template)
    assert len(encoder.with_answers([user("?")], ["x", "y"])) == 2
    with pytest.raises(ExampleError, match="The answer '' has no tokens"):
        encoder.with_answers([user("?")], ["x", ""])


@pytest.mark.parametrize("template", [None, PLAIN])
def test_a_choice_that_the_tokenizer_drops_is_refused(template: str | None) -> None:
    """Only the end of the turn would be scored, which any choice has."""
    tokenizer = byte_tokenizer(template=template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    encoder = Encoder(tokenizer=tokenizer, data=DataConfig(), template=template)
    assert len(encoder.with_answers([user("?")], ["x", "\u200by"])) == 2
    with pytest.raises(ExampleError, match=r"The answer '\\u200b' has no tokens"):
        encoder.with_answers([user("?")], ["x", "\u200b"])


@pytest.mark.parametrize(
    ("epochs", "rows", "wanted"),
    [(1.1, 100, 110), (0.7, 10, 7), (0.29, 100, 29), (1 / 3, 3, 1), (2.5, 7, 18), (1e-6, 5, 1)],
)
def test_epochs_are_as_they_are_written(epochs: float, rows: int, wanted: int) -> None:
    """1.1 * 100 is 110.00000000000001 in binary."""
    assert rows_of(epochs, rows) == wanted


@pytest.mark.parametrize(
    ("names", "said"), [(["a"], "at least two classes"), (["a", "a "], "one label written in")]
)
def test_declared_classes_are_looked_at_as_others_are(
    tmp_path: Path, names: list[str], said: str
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"text": ["x", "y"], "label": [0, len(names) - 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=said):
        options: dict[str, Any] = {"label_field": "label", "column_names": (), "flag": "--data"}
        read_classes(str(tmp_path / "a.parquet"), **options)
