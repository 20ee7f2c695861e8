"""Task seq_cls in its parts: labels and tables, batches, scores, heads, and what is refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CodeGenConfig,
)

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.base_model.architecture import meta_model, read_config
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import find_keys
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.data import class_names, labelled_batch, load_labelled, pack, read_classes
from sparse_lora_dist.data.labelled import LabelledDocuments
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.tasks import class_head
from sparse_lora_dist.tasks.class_head import find_head, first_values
from sparse_lora_dist.tasks.seq_cls import class_scores
from tests.conftest import Ranks
from tests.fixtures.tiny_classifier import SIZES, framing_tokenizer, save_base, write_labelled
from tests.fixtures.tiny_run import TinyRun

COLUMNS = ("source", "label", "mark", "text")
COLA = 'gj04\t1\t\tHe said "no.\ngj04\t0\t*\tHim said, no.\n'


pytestmark = pytest.mark.usefixtures("own_cache")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def jsonl(path: Path, *records: dict[str, Any]) -> Path:
    return written(path, "".join(json.dumps(r) + "\n" for r in records))


def classes_of(path: Path, columns: tuple[str, ...] = ()) -> list[str]:
    return read_classes(str(path), label_field="label", column_names=columns, flag="--data")


def load(path: Path, **options: Any) -> LabelledDocuments:
    usual: dict[str, Any] = {
        "text_fields": ("text",),
        "label_field": "label",
        "column_names": (),
        "classes": ("0", "1"),
        "segments": True,
        "sequence_length": 24,
        "max_samples": None,
    }
    tokenizer = options.pop("tokenizer", None) or framing_tokenizer()
    return load_labelled(str(path), tokenizer, **{**usual, **options})


def test_classes_come_in_the_order_of_their_numbers() -> None:
    """As text "10" stands before "2"."""
    numbers = sorted(range(12), key=str)
    config = BertConfig(id2label={str(n): f"class {n}" for n in numbers})
    assert class_head.classes_of(config) == [f"class {n}" for n in range(12)]


# --- tables and labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("header", [True, False])
def test_a_tsv_is_read_with_names_in_its_first_line_and_without(
    tmp_path: Path, header: bool
) -> None:
    path = written(tmp_path / "cola.tsv", "\t".join(COLUMNS) * header + "\n" * header + COLA)
    columns = () if header else COLUMNS
    assert classes_of(path, columns) == ["0", "1"]
    documents = load(path, column_names=columns)
    texts = [framing_tokenizer().decode(documents[i].input_ids) for i in range(2)]
    assert texts == ['<s>He said "no.</s>', "<s>Him said, no.</s>"], "a quote is a letter"
    assert [documents[i].labels.tolist() for i in range(2)] == [[1], [0]]


def test_faults_of_a_table_without_names_have_their_place(tmp_path: Path) -> None:
    path = written(tmp_path / "cola.tsv", COLA + "gj04\t2\t\tNobody.\n")
    with pytest.raises(UserError, match=r"cola\.tsv, example 3: The label '2' is not one .* 0, 1"):
        load(path, column_names=COLUMNS)
    with pytest.raises(UserError, match=r"has 4 cells, but --column_names has 2 names"):
        classes_of(path, ("text", "label"))
    written(path, COLA + "one cell\n")
    with pytest.raises(UserError, match=r"cola\.tsv:3: This line has 1 cells, but the first has 4"):
        classes_of(path, COLUMNS)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 9, -1], ["-1", "9", "10"]),
        (["b", "a", "b"], ["a", "b"]),
        (["10", "9"], ["9", "10"]),
    ],
)
def test_classes_are_sorted_by_size_or_alphabet(
    tmp_path: Path, labels: list[Any], names: list[str]
) -> None:
    records = [{"text": "x", "label": label} for label in labels]
    assert classes_of(jsonl(tmp_path / "a.jsonl", *records)) == names


def test_a_data_set_that_names_its_classes_is_believed(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "hm"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    table.to_parquet(tmp_path / "a.parquet")
    assert classes_of(tmp_path / "a.parquet") == ["no", "yes", "hm"]
    documents = load(tmp_path / "a.parquet", classes=("hm", "yes", "no"))
    assert [documents[i].labels.tolist() for i in range(2)] == [[1], [2]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0], "Every example of .* has the label '0', but a classifier needs at least two"),
        ([0, 1.5], r"a\.jsonl:2: The label must be a whole number or text, got float: 1\.5"),
        ([True, False], r"a\.jsonl:1: The label must be .* got bool: True"),
        ([1, None], r"a\.jsonl:2: The label must be .* got NoneType"),
        (["a", ""], r"a\.jsonl:2: The label of this example is empty"),
    ],
)
def test_what_names_no_class_is_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": label} for label in labels))
    with pytest.raises(UserError, match=message):
        classes_of(path)


def test_names_that_the_model_knows_keep_its_order() -> None:
    assert class_names(["bad", "good"], ["good", "fair", "bad"]) == ["good", "fair", "bad"]
    assert class_names(["0", "1"], ["LABEL_0", "LABEL_1"]) == ["0", "1"]


# --- documents and batches -----------------------------------------------------------------------


def test_pairs_are_framed_by_the_tokenizer_cut_and_counted(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "ab", "second": "cde", "label": 1},
        {"text": "a" * 30, "second": "c" * 4, "label": 0},
        {"text": "a", "second": " ", "label": 0},
    )
    documents = load(path, text_fields=("text", "second"))
    decode = framing_tokenizer().decode
    assert decode(documents[0].input_ids) == "<s>ab</s>cde</s>"
    assert documents[0].segment_ids.tolist() == [0] * 4 + [1] * 4
    assert decode(documents[1].input_ids) == "<s>" + "a" * 17 + "</s>cccc</s>", "the longer is cut"
    assert documents.report() == (
        "2 examples (label 0: 1, label 1: 1), 32 tokens; 1 cut to --sequence_length 24 (raise it "
        "to 37 to keep all); 1 left out, without text"
    )
    assert len(load(path, segments=False)[0].segment_ids) == 0


def test_a_text_without_a_token_is_no_example(tmp_path: Path) -> None:
    """Some tokenizers drop spaces without width. The row was scored as one of padding."""
    path = jsonl(tmp_path / "a.jsonl", *({"text": t, "label": 1} for t in ("ab", "\u200b")))
    tokenizer = framing_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    documents = load(path, tokenizer=tokenizer)
    assert documents.report().endswith("1 left out, without text") and len(documents) == 1


def test_a_batch_is_padded_under_a_mask_and_filler_is_no_target(tmp_path: Path) -> None:
    texts = ["abcdefgh", "x"]
    path = jsonl(tmp_path / "a.jsonl", *({"text": t, "label": i} for i, t in enumerate(texts)))
    documents = load(path)
    rows = pack(documents, sequence_length=24, packing=False, seed=0)
    batch = labelled_batch(rows, (0, 1, -1), pad_id=9, shuffle=False)
    assert batch.attention_mask_MT.sum(1).tolist() == [10, 3, 3]
    assert batch.input_ids_MT.shape == (3, 16)
    assert batch.input_ids_MT[1, 3:].eq(9).all()
    assert torch.equal(batch.input_ids_MT[2], batch.input_ids_MT[1]), "BART counts end tokens"
    alone = labelled_batch(rows, (-1, -1), pad_id=9, shuffle=False)
    assert torch.equal(alone.input_ids_MT[0, :10], batch.input_ids_MT[0, :10])
    assert alone.labels_M.tolist() == [-100, -100] and alone.lengths_M == (0, 0)
    assert batch.labels_M.tolist() == [0, 1, -100]
    assert (batch.num_targets, sum(batch.lengths_M)) == (2, 13)


# --- scores --------------------------------------------------------------------------------------


def tally(labels: list[int], said: list[int], classes: int) -> torch.Tensor:
    counts = torch.zeros(classes, classes, dtype=torch.float64)
    for label, answer in zip(labels, said, strict=True):
        counts[label, answer] += 1
    return torch.cat([torch.tensor([3.0], dtype=torch.float64), counts.flatten()])


def test_matthews_is_the_correlation_of_labels_and_answers() -> None:
    labels, said = [1, 1, 1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 1, 1, 0, 1]
    scores = class_scores(tally(labels, said, 2))
    assert scores["held_out_matthews"] == pytest.approx(np.corrcoef(labels, said)[0, 1])
    assert (scores["held_out_accuracy"], scores["held_out_loss"]) == (6 / 8, 3 / 8)
    assert class_scores(tally(labels, [1] * 8, 2))["held_out_matthews"] == 0.0
    opposite = class_scores(tally(labels, [1 - x for x in labels], 2))
    assert opposite["held_out_matthews"] == pytest.approx(-1.0)


def test_matthews_of_three_classes_is_that_of_their_indicators() -> None:
    labels, said = [0, 1, 2, 2, 1, 0, 2], [0, 2, 2, 2, 1, 1, 0]
    x, y = (np.eye(3)[v] - np.eye(3)[v].mean(0) for v in (labels, said))
    wanted = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert class_scores(tally(labels, said, 3))["held_out_matthews"] == pytest.approx(wanted)


# --- heads ---------------------------------------------------------------------------------------


def shell(folder: Path, num_labels: int = 2) -> Any:
    architecture = read_config(folder, trust_remote_code=False)
    architecture.num_labels = num_labels
    return meta_model(
        architecture,
        task="seq_cls",
        dtype=torch.bfloat16,
        attn_implementation=None,
        trust_remote_code=False,
    )


@pytest.mark.usefixtures("model_on_disk")
def test_a_new_head_is_drawn_as_transformers_does_and_the_same_everywhere(tmp_path: Path) -> None:
    save_base(tmp_path, "bert", hidden_size=128, initializer_range=0.05)
    model, files = shell(tmp_path), CheckpointFiles(tmp_path)
    head = find_head(model, files, find_keys(model, files))
    assert list(head.modules) == ["classifier", "bert.pooler.dense"]
    state = torch.get_rng_state()
    values = first_values(model, head.new, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the run's own generator is left alone"
    weight = values["bert.pooler.dense.weight"](0, 128 * 128)
    assert weight.std() == pytest.approx(0.05, rel=0.02) and weight.dtype == torch.float32
    assert values["bert.pooler.dense.bias"](0, 128).eq(0).all()
    torch.rand(5)
    again = first_values(shell(tmp_path), head.new, seed=3)["bert.pooler.dense.weight"]
    assert torch.equal(again(100, 300), weight[100:300])
    other = first_values(model, head.new, seed=4)["bert.pooler.dense.weight"]
    assert not torch.equal(other(0, 128 * 128), weight)


@pytest.mark.usefixtures("model_on_disk")
def test_norms_of_the_first_berts_are_found_by_their_old_names(tmp_path: Path) -> None:
    save_base(tmp_path, "bert-with-pooler")
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for k, t in tensors.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    keys_of = find_keys(shell(tmp_path), CheckpointFiles(tmp_path))
    assert keys_of["bert.embeddings.LayerNorm.weight"] == ["embeddings.LayerNorm.gamma"]
    assert keys_of["bert.embeddings.LayerNorm.bias"] == ["embeddings.LayerNorm.beta"]
    assert sorted(keys_of.values()) == sorted([key] for key in old)
    assert "classifier.weight" not in keys_of


def test_a_head_in_the_checkpoint_is_kept(ranks: Ranks, tmp_path: Path) -> None:
    tiny = with_head(tmp_path, {0: "ugly", 1: "bad", 2: "good"})
    flags = tiny.flags(tmp_path / "run", task="seq_cls", max_steps=1, learning_rate=1e-12)
    assert (
        "classifier trained in full; values of the base model"
        in ranks(1, "tests.work.run:train", flags=flags)[0]
    )
    ours = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny.model).classifier.weight
    assert torch.allclose(ours["base_model.model.classifier.weight"], theirs, atol=1e-6)
    names = json.loads((tmp_path / "run" / "adapter" / "id2label.json").read_text())
    assert names == {"0": "ugly", "1": "bad", "2": "good"}, "the checkpoint's order"


def with_head(folder: Path, names: dict[int, str]) -> TinyRun:
    """A BERT that labels already."""
    tiny = write_labelled(folder, save_base(folder / "model", "bert"))
    config = BertConfig.from_pretrained(tiny.model, id2label=names)
    BertForSequenceClassification(config).save_pretrained(tiny.model)
    return tiny


# --- dropout of inputs that are no rows of tokens ------------------------------------------------


def test_masks_of_pooled_tokens_belong_to_rows_and_those_of_positions_to_none() -> None:
    def seeds(*rows: int) -> RowSeeds:
        seeds = RowSeeds(seed=0, sequence_length=16, step=1)
        seeds.begin(rows, (8,) * len(rows), num_positions=8)
        return seeds

    def mask(rows: tuple[int, ...], *shape: int) -> torch.Tensor:
        return seeds(*rows).keep_mask(torch.ones(shape), "site", rows, 1, 0.5)

    both = mask((3, 4), 2, 32)
    assert torch.equal(both[1:], mask((4,), 1, 32)) and not torch.equal(both[0], both[1])
    tokens = mask((3, 4), 2, 8, 32)
    assert torch.equal(tokens.flatten(0, 1), mask((3, 4), 16, 32)), "tokens one after another"
    table = mask((3, 4), 1, 20, 32)
    assert torch.equal(table, mask((5,), 1, 20, 32)), "whatever rows and however many"


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("bert")
    return write_labelled(folder, save_base(folder / "model", "bert"))


def refusal(ranks: Ranks, tiny: TinyRun, folder: Path, **options: object) -> str:
    """Of both ranks alike, before a weight is read."""
    flags = tiny.flags(folder / "run", **{"task": "seq_cls"} | options)
    first, second = ranks(2, "tests.work.run:refusal_unread", flags=flags)
    assert first == second
    return str(first)


def test_data_that_do_not_fit_are_refused(ranks: Ranks, bert: TinyRun, tmp_path: Path) -> None:
    said = refusal(ranks, bert, tmp_path, label_field="stars")
    assert "no column 'stars'" in said and "text, second, label, number" in said
    said = refusal(ranks, bert, tmp_path, text_pair_field="third")
    assert "no column 'third'" in said
    strange = jsonl(tmp_path / "strange.jsonl", {"text": "a", "label": "odd"})
    said = refusal(ranks, bert, tmp_path, eval_data=strange)
    assert (
        "strange.jsonl:1: The label 'odd' is not one of the classes of --data: bad, good, ugly"
        in said
    )
    long = jsonl(tmp_path / "long.jsonl", *({"text": "a" * 99, "label": i} for i in range(2)))
    said = refusal(ranks, bert, tmp_path, data=long, eval_data="null", sequence_length=80)
    assert "80 tokens, but the model has only 66 positions" in said


def test_a_head_of_other_classes_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    two = with_head(tmp_path / "two", {0: "bad", 1: "good"})
    said = refusal(ranks, two, tmp_path)
    assert "has 2 classes (classifier.weight)" in said and "bad, good, ugly" in said
    other = with_head(tmp_path / "other", {0: "dog", 1: "cat", 2: "cow"})
    said = refusal(ranks, other, tmp_path)
    assert "is for the classes dog, cat, cow" in said and "bad, good, ugly" in said


def test_models_that_the_task_does_not_suit_are_refused(
    ranks: Ranks, bert: TinyRun, tiny: TinyRun, tmp_path: Path
) -> None:
    said = refusal(ranks, bert, tmp_path, task="causal_lm")
    assert "bert is an encoder" in said and "--task seq_cls" in said
    CodeGenConfig(n_layer=1, n_head=4, n_embd=16).save_pretrained(tmp_path / "codegen")
    save_file({"a": torch.zeros(1)}, tmp_path / "codegen" / "model.safetensors")
    said = refusal(ranks, bert, tmp_path, model=tmp_path / "codegen")
    assert "no codegen model for --task seq_cls" in said
    said = refusal(ranks, tiny, tmp_path)
    assert "has no column 'label', 'text'" in said or "no column 'label'" in said


def test_options_of_another_task_are_refused_at_once(bert: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a row holds one example with its label"):
        load_config(bert.flags(tmp_path, task="seq_cls", packing=True))
    with pytest.raises(ConfigError, match="text_pair_field belongs to --task seq_cls"):
        load_config(bert.flags(tmp_path, text_pair_field="second"))
    assert not load_config(bert.flags(tmp_path, task="seq_cls")).packs
    assert load_config(bert.flags(tmp_path)).packs
    assert SIZES["hidden_dropout_prob"] > 0, "the fixtures' own dropout must be switched off"
