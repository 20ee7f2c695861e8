"""Users gave a clone without git-lfs, a file of a crash, one shard of several, or a template of
another program."""

from pathlib import Path

import pytest
from tokenizers import Regex, normalizers

from sparse_lora_dist.adapter.peft_read import open_peft
from sparse_lora_dist.base_model.architecture import resolve_folder
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.data.fields import find_template
from sparse_lora_dist.data.folders import missing_shards
from sparse_lora_dist.errors import UserError
from tests.fixtures.data_files import assistant, jsonl, load, pairs, user
from tests.fixtures.tiny_tokenizer import PLAIN, byte_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
KINDS = ["txt", "jsonl", "json", "csv", "tsv", "parquet"]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_are_pointers_of_git_lfs_are_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / f"train.{kind}"
    file.write_text(POINTER)
    for source in (file, folder):
        with pytest.raises(UserError, match=rf"train\.{kind} is a pointer of git LFS.*lfs pull"):
            load(source)
    card = f"configs:\n- config_name: default\n  data_files: train.{kind}\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(UserError, match="is a pointer of git LFS"):
        load(folder)


def test_a_text_about_git_lfs_is_learned(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A pointer begins so:\n" + POINTER)
    assert load(tmp_path / "a.txt").num_tokens > 90


@pytest.mark.parametrize("kind", KINDS[:5])
def test_a_file_with_nul_bytes_of_a_crash_is_refused(tmp_path: Path, kind: str) -> None:
    text = {"jsonl": '{"text": "b"}', "json": '{"text": "b"}'}.get(kind, "text\nb")
    file = tmp_path / f"a.{kind}"
    file.write_text(f"{text}\n" + "\0" * 60)
    line = text.count("\n") + 2
    with pytest.raises(UserError, match=rf"a\.{kind}:{line}: This line has NUL bytes"):
        load(file)


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "model.safetensors"])
def test_a_model_or_adapter_cloned_without_git_lfs_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    (tmp_path / "consolidated.safetensors").write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a pointer of git LFS"):
        resolve_folder(str(tmp_path), None)
    with pytest.raises(UserError, match=rf"{name} is a pointer of git LFS"):
        open_peft(str(tmp_path))
    (tmp_path / name).unlink()
    assert resolve_folder(str(tmp_path), None) == tmp_path


@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, "is a pointer of git LFS"), ("\0\0", ":1: This line has NUL")]
)
def test_a_template_that_is_no_text_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "a.jinja"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"a\.jinja ?{said}"):
        find_template(byte_tokenizer(), str(file))


@pytest.mark.parametrize("template", ["", "Static text.", "### {instruction}", "{{ prompt }}"])
@pytest.mark.parametrize(
    "row", [{"messages": [user("ask"), assistant("reply")]}, {"prompt": "ask", "response": "reply"}]
)
def test_a_template_that_writes_no_message_is_named(
    tmp_path: Path, template: str, row: dict[str, object]
) -> None:
    file = tmp_path / "a.jinja"
    file.write_text(template)
    data = jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match="writes none of the messages. Give a --chat_template") as e:
        load(data, byte_tokenizer(template=PLAIN), chat_template=str(file))
    assert "--sequence_length" not in str(e.value)


def test_answers_without_a_text_are_no_fault_of_the_template(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"messages": [user(""), assistant("")]}])
    nothing = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"without a target token\. Give other data") as refused:
        load(data, byte_tokenizer(template=nothing))
    assert "--sequence_length" not in str(refused.value)


@pytest.mark.parametrize("row", [{"text": "abc"}, {"prompt": "ask", "response": "reply"}])
def test_a_tokenizer_without_a_token_for_any_text_is_named(
    tmp_path: Path, row: dict[str, str]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="The tokenizer gives no token for any text") as refused:
        load(jsonl(tmp_path / "a.jsonl", [row]), tokenizer)
    assert "--sequence_length" not in str(refused.value)


def test_a_folder_in_place_of_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder\. Name a file with a Jinja template"):
        load_config(["--chat_template", str(tmp_path)])


def test_a_header_with_the_given_names_in_another_order_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,response\nhello,world books\n")
    with pytest.raises(UserError, match="names of --column_names, in another order"):
        load(file, column_names=("response", "prompt"))


@pytest.mark.parametrize(
    ("there", "absent"),
    [
        (["train-00000-of-00002"], ["train-00001-of-00002.jsonl"]),
        (["train-00000-of-00003", "train-00002-of-00003"], ["train-00001-of-00003.jsonl"]),
        (["a-00002-of-00002"], ["a-00001-of-00002.jsonl"]),
        (["00000-of-00002", "00001-of-00002"], []),
        (["a-00001-of-00002", "a-00002-of-00002"], []),
        (["notes-7-of-9", "part-3"], []),
    ],
)
def test_shards_that_are_missing_are_named(
    tmp_path: Path, there: list[str], absent: list[str]
) -> None:
    for name in there:
        jsonl(tmp_path / "s" / f"{name}.jsonl", pairs("a"))
    notes = [n for n in load(tmp_path / "s").reading.notes if "belong to them" in n]
    assert bool(notes) == bool(absent) and all(name in notes[0] for name in absent)
    alone = load(tmp_path / "s" / f"{there[0]}.jsonl").reading.notes
    assert not [n for n in alone if "belong to them" in n]


def test_shards_with_a_hash_each_are_one_set(tmp_path):
    """datasets named files so until 2023: all are there, and none was said to be."""
    for number, name in enumerate(("a3ecf92756993583", "0a1804bcb6ae68c6", "6f5c1bfbf1e2c3d4")):
        jsonl(tmp_path / "s" / f"train-0000{number}-of-00003-{name}.jsonl", pairs("x"))
    assert missing_shards(sorted((tmp_path / "s").iterdir())) == []
    next((tmp_path / "s").glob("*-00001-*")).unlink()
    assert missing_shards(sorted((tmp_path / "s").iterdir())) == ["train-00001-of-00003.jsonl"]
