"""Tables with stray quotes, labels of two kinds, classifiers without a pad token, and advice that
can be followed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparse_lora_dist.base_model.architecture import read_config
from sparse_lora_dist.checkpoint.own_files import clean
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import (
    Adapter,
    _older_than_the_run,
    differences_from_training,
)
from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.model.prompting import Prompting
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.tasks.seq_cls import settle_classes
from tests.conftest import Ranks
from tests.export.test_export_program import exported
from tests.fixtures.data_files import jsonl, learned, load
from tests.fixtures.tiny_classifier import write_labelled
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import MARKED, byte_tokenizer
from tests.plan.test_plan import outcome

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("cell", "line"),
    [('"5 inch', 3), ('"5" wide" x', 3), (r'"a \" b"', 3)],
    ids=["never closed", "text after it", "of MySQL"],
)
def test_a_quote_that_swallows_rows_is_refused_with_its_line(
    tmp_path: Path, cell: str, line: int
) -> None:
    """Without strict, Python's csv takes all rows after it into one cell."""
    file = tmp_path / "a.csv"
    file.write_text(f"prompt,response\nhow many?,5\nhow wide?,{cell}\nhow long?,7\nhow deep?,9\n")
    with pytest.raises(UserError, match=rf"a\.csv:{line}: This line or one after it cannot be"):
        load(file)


def test_quotes_as_they_should_be_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,response\nhow wide?,"5"" wide, or\n6"\nb,5" long\n')
    first, second = learned(load(file))
    assert '5" wide, or\n6' in first and '5" long' in second


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_rows_of_empty_cells_are_left_out_and_counted(tmp_path: Path, kind: str, end: str) -> None:
    """Excel saves them. A row of an empty answer alone stays, and so does an empty line in a cell,
    which a TSV file cannot have."""
    between = "," if kind == "csv" else "\t"
    rows = [["prompt", "response"], ["a", "b"], ["", ""], [" ", "\xa0"], [], ["c", ""], ["", ""]]
    rows += [["d", '"e\n,\nf"']] if kind == "csv" else []
    file = tmp_path / f"a.{kind}"
    file.write_bytes("".join(between.join(row) + end for row in rows).encode())
    documents = load(file)
    expected = ["b</s>", "</s>", "e\n,\nf</s>"]
    assert learned(documents) == expected[: 3 if kind == "csv" else 2]
    assert documents.reading is not None
    assert documents.reading.notes == ("rows of empty cells are left out: 3",)


def test_a_first_row_of_empty_cells_is_left_out_too(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(",\na,b\n")
    assert learned(load(file, column_names=("prompt", "response"))) == ["b</s>"]
    file.write_text("prompt,response\n,\n")
    with pytest.raises(UserError, match="It is empty"):
        load(file)


def test_a_number_of_thousands_of_digits_in_a_column_that_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"prompt": "a", "response": "b", "id": {"1" * 5000}}}\n')
    assert len(load(file)) == 1


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["1", "2", "x"], "the labels are whole numbers and names. If 'x' is no class"),
        (["1", "2"], ""),
        (["a", "b"], ""),
        (["1", "+1", "2"], "two ways"),
        (["01", "1", "2"], "two ways"),
        (["0", "-0", "1"], "two ways"),
    ],
)
def test_labels_of_two_kinds_in_a_table_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: list[str], said: str
) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    data = DataConfig(data=str(file), label_field="label")
    config = LlamaConfig(vocab_size=8)
    try:
        settle_classes(config, data)
    except UserError as error:
        assert said == "two ways" and said in str(error)
    else:
        assert sorted(config.id2label.values()) == sorted(labels)
        screen = " ".join(capsys.readouterr().out.split())
        assert said in screen and ("note" in screen) == bool(said)


def test_a_base_with_code_of_its_own_names_the_option(tmp_path: Path) -> None:
    content = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UserError, match="add --trust_remote_code true"):
        read_config(tmp_path, trust_remote_code=False)


def test_configurations_of_a_data_set_are_refused_with_what_can_be_done(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"text": "a"}\n')
    parts = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    with pytest.raises(UserError, match="give the files or the folder of one configuration"):
        load(tmp_path)


@pytest.mark.parametrize(("heads", "of_keys"), [(4, 3), (4, 8), (4, 0)])
def test_heads_of_keys_that_do_not_divide_the_others_are_refused(
    tmp_path: Path, heads: int, of_keys: int
) -> None:
    content = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": of_keys}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"4 attention heads and {of_keys} heads of keys"):
        read_config(tmp_path, trust_remote_code=False)


def test_what_safetensors_left_of_a_write_is_removed_with_the_folder(tmp_path: Path) -> None:
    left = tmp_path / f".tmp_step_00000002.{'a' * 16}"
    notes = tmp_path / f".tmp_step_00000004.{'b' * 16}"
    for folder in (left, notes):
        folder.mkdir()
        (folder / ".tmpYEvZHs").write_bytes(b"half")
    (notes / "mine.txt").write_text("kept")
    clean(tmp_path)
    assert not left.exists() and (notes / "mine.txt").read_text() == "kept"


def test_a_base_saved_for_torchscript_trains(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"return_dict": False}))
    losses = []
    for model in (tiny.model, tmp_path / "model"):
        run = tmp_path / f"run_{len(losses)}"
        ranks(1, "tests.work.run:train", flags=tiny.flags(run, model=model, max_steps=2))
        losses.append([row["loss"] for row in read_records(run / "metrics.jsonl") if "loss" in row])
    assert losses[0] == losses[1]


TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {}}}


@pytest.mark.parametrize(
    ("tools", "said"), [((TOOL, None, None), "2 rows have none"), ((TOOL, TOOL, TOOL), "")]
)
def test_rows_that_the_template_for_tools_renders_without_any_are_said(
    tmp_path: Path, tools: tuple[object, ...], said: str
) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": chat} | ({"tools": [tool]} if tool else {}) for tool in tools]
    with_tools = MARKED.replace("{%", "{{ tools }}{%", 1)
    own: Any = {"default": MARKED, "tool_use": with_tools}
    notes = load(jsonl(tmp_path / "a.jsonl", rows), byte_tokenizer(template=own)).reading.notes
    assert [said in note for note in notes if "tool_use" in note] == ([True] if said else [])


def test_a_sum_whose_first_run_edits_facts_stops_where_the_other_does() -> None:
    chat = Prompting(chat_template=MARKED, is_own=True, ends={"</s>": 4}, generation={})
    edits: Any = SimpleNamespace(prompting=None)
    other: Any = SimpleNamespace(prompting=chat)
    for first, rest in ((edits, other), (other, edits)):
        found = Union.prompting.func(SimpleNamespace(first=first, others=(rest,)))
        assert found.ends == {"</s>": 4} and found.generation == {"eos_token_id": 4}
    assert Union.prompting.func(SimpleNamespace(first=edits, others=(edits,))) is None


def test_an_adapter_of_an_earlier_end_of_its_run_is_said(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """A run that was finished goes on, and is killed after a checkpoint."""
    run, options = tmp_path / "run", {"save_every": 1, "resume": "auto"}
    work = "tests.work.run:train"
    ranks(1, work, flags=tiny.flags(run, max_steps=2, **options))
    older = "adapter is of step 2, and the run's newest checkpoint of step 3"
    assert not [note for note in _older_than_the_run(run) if older in note]
    ranks(1, work, flags=tiny.flags(run, max_steps=4, stop_after=3, **options))
    assert _older_than_the_run(run) == []  # --stop_after writes the adapter too
    lines = (run / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines][-1] == "stopped"
    shutil.copyfile(run / "attempts.jsonl", tmp_path / "as_if_killed")
    kept = [line for line in lines if json.loads(line)["event"] == "finished"]
    (run / "attempts.jsonl").write_text(kept[0] + "\n")
    for folder in (run, run / "adapter"):
        assert [note for note in _older_than_the_run(folder) if older in note]
    shutil.copyfile(tmp_path / "as_if_killed", run / "attempts.jsonl")
    shutil.rmtree(run / "checkpoints" / "step_00000003")  # gone back
    assert "adapter is of step 3, and the run's newest checkpoint of step 2" in str(
        _older_than_the_run(run)
    )
    ranks(1, work, flags=tiny.flags(run, max_steps=4, **options))
    assert _older_than_the_run(run) == []


def test_weights_beside_an_adapter_that_peft_does_not_read_are_said(
    tiny: TinyRun, tmp_path: Path
) -> None:
    """As --uniform_rank writes modules trained in full."""
    (tmp_path / "modules_to_save.safetensors").touch()
    config = load_config(["--model", str(tiny.model), "--data", str(tiny.data)])
    notes = differences_from_training(Adapter(name=str(tmp_path)), config, byte_tokenizer())
    assert [note for note in notes if "which PEFT does not read" in note]


@pytest.mark.usefixtures("model_on_disk")
def test_a_plan_reads_as_many_bytes_as_the_files_have(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(dtype).save_pretrained(folder)
        (file,) = folder.glob("*.safetensors")
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        found = outcome(model=str(folder), rank=4)
        assert found.speed.file_bytes == file.stat().st_size - header
        file.unlink()


def test_a_merged_classifier_scores_rows_together_and_none_is_exported_without_its_head(
    ranks: Ranks, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    base = tmp_path / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=None)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    run = tmp_path / "run"
    tiny = write_labelled(tmp_path, base)
    ranks(1, "tests.work.run:train", flags=tiny.flags(run, task="seq_cls", sequence_length=48))
    merged = exported(run, tmp_path / "merged", "--format", "merged", "--dtype=fp32")
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id
    its = AutoTokenizer.from_pretrained(merged)
    rows = its(["a cat", "the old dog ran far away"], padding=True, return_tensors="pt")
    alone = its(["a cat"], return_tensors="pt")
    with torch.no_grad():
        both, one = model(**rows).logits[0], model(**alone).logits[0]
    assert both.numpy() == pytest.approx(one.numpy(), abs=1e-4)
    with pytest.raises(UserError, match="leaves out the classifier's head"):
        exported(run, tmp_path / "uniform", "--uniform_rank", "true")
    assert not (tmp_path / "uniform").exists()
