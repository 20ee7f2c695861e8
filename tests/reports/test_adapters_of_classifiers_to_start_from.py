"""A classifier that begins from an adapter (--init_adapter): its classes are those of the data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_lora_dist.adapter.peft_classes import ClassRows
from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.errors import UserError
from tests.conftest import Ranks
from tests.fixtures.tiny_classifier import save_base, write_labelled
from tests.fixtures.tiny_run import TinyRun

SITE = "bert.encoder.layer.0.output.dense"
NAMES = ("bad", "good", "ugly")
HEAD = ("classifier.weight", "classifier.bias")
SIDES = {f"{SITE}.lora_a": (2, 4), f"{SITE}.lora_b": (4, 2)}


def adapter(folder: Path, names: object = None, classes: int = 3) -> Path:
    """An adapter whose head has row i full of i, with an id2label.json or without."""
    rows = torch.arange(float(classes))
    tensors = {
        f"base_model.model.{SITE}.lora_A.weight": torch.ones(2, 4),
        f"base_model.model.{SITE}.lora_B.weight": torch.ones(4, 2),
        "base_model.model.classifier.weight": rows[:, None].repeat(1, 5),
        "base_model.model.classifier.bias": rows,
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS"}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if names is not None:
        named = dict(enumerate(names)) if isinstance(names, tuple) else names
        (folder / "id2label.json").write_text(json.dumps(named))
    return folder


def rows_of(folder: Path, names: tuple[str, ...] = NAMES, **head: Any) -> list[list[float]]:
    """The classes of the adapter whose rows the run's head begins with: weights, then biases."""
    shapes: dict[str, tuple[int, ...]] = {HEAD[0]: (len(names), 5), HEAD[1]: (len(names),)}
    classes = ClassRows(names=names, parameters=head.get("parameters", HEAD))
    values = read_peft(
        str(folder), SIDES | shapes, rank=2, alpha=4.0, task_type="SEQ_CLS", classes=classes
    )
    # As ranks read: ranges that begin and end within a row.
    weight = torch.cat([values[HEAD[0]](0, 7), values[HEAD[0]](7, 5 * len(names))])
    return [weight[::5].tolist(), values[HEAD[1]](0, len(names)).tolist()]


def test_rows_of_the_head_go_to_the_classes_of_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path, ("ugly", "bad", "good"))
    assert rows_of(folder) == [[1, 2, 0]] * 2
    assert "by their names: bad, good, ugly" in capsys.readouterr().out
    assert rows_of(folder, ("ugly", "bad", "good")) == [[0, 1, 2]] * 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("names", [None, {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}])
def test_classes_without_names_are_said_to_be_taken_by_number(
    tmp_path: Path, names: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows_of(adapter(tmp_path, names)) == [[0, 1, 2]] * 2
    said = capsys.readouterr().out
    assert "cannot be compared" in said and "bad, good, ugly" in said


def test_labels_that_are_numbers_are_the_numbers_of_the_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows_of(adapter(tmp_path, ("ugly", "bad", "good")), ("0", "1", "2")) == [[0, 1, 2]] * 2
    assert "cannot be compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "classes", "said"),
    [
        (("bad", "fine", "ugly"), 3, "for the classes bad, fine, ugly, but --data has the labels"),
        (
            ("bad", "good"),
            2,
            "for the classes bad, good, but --data has the labels bad",
        ),
        (None, 2, "has 2 classes, but --data has the labels bad, good, ugly"),
        (("bad", "good", "ugly"), 4, "names 3 classes, but its head has 4"),
        ("{", 3, "id2label.json is damaged"),
        ([1], 3, "id2label.json is damaged"),
        ({"a": "bad"}, 3, "id2label.json is damaged"),
        ({"0": "bad", "1": "good", "3": "ugly"}, 3, "id2label.json is damaged"),
    ],
    ids=str,
)
def test_other_classes_are_refused(tmp_path: Path, names: object, classes: int, said: str) -> None:
    folder = adapter(tmp_path, names, classes)
    if names == "{":
        (folder / "id2label.json").write_text("{")
    with pytest.raises(UserError, match=said):
        rows_of(folder)


def test_rows_that_may_lie_in_two_modules_are_not_guessed(tmp_path: Path) -> None:
    both = (*HEAD, f"{SITE}.lora_a")
    with pytest.raises(UserError, match="id2label of the base's config.json"):
        rows_of(adapter(tmp_path, ("ugly", "bad", "good")), parameters=both)


def renamed(tiny: TinyRun, folder: Path) -> TinyRun:
    """The same examples with names of another alphabet: the classes bad, good, ugly are now last,
    middle, first."""
    names = {"bad": "zbad", "good": "mgood", "ugly": "augly"}
    rows = [json.loads(line) for line in tiny.data.read_text().splitlines()]
    lines = [json.dumps(row | {"label": names[row["label"]]}) + "\n" for row in rows]
    data = folder / "renamed.jsonl"
    data.write_text("".join(lines))
    return TinyRun(model=tiny.model, data=data, held_out=data)


def test_a_run_goes_on_with_the_classes_of_its_adapter(ranks: Ranks, tmp_path: Path) -> None:
    tiny = write_labelled(tmp_path, save_base(tmp_path / "model", "bert-with-pooler"))
    options = {"task": "seq_cls", "sequence_length": 48, "max_steps": 1, "alpha": 6.0}
    ranks(1, "tests.work.run:train", flags=tiny.flags(tmp_path / "first", **options))
    first = tmp_path / "first" / "adapter"
    names = {"0": "zbad", "1": "mgood", "2": "augly"}
    (first / "id2label.json").write_text(json.dumps(names))
    again = renamed(tiny, tmp_path)
    options |= {"init_adapter": first, "learning_rate": 1e-12}
    (said,) = ranks(1, "tests.work.run:train", flags=again.flags(tmp_path / "second", **options))
    assert "classifier trained in full; values of --init_adapter" in said
    assert "randomly" not in said
    key = "base_model.model.classifier.weight"
    before, after = (
        load_file(run / "adapter_model.safetensors")[key]
        for run in (first, tmp_path / "second" / "adapter")
    )
    torch.testing.assert_close(after, before[[2, 1, 0]], rtol=0, atol=1e-6)
    flags = again.flags(tmp_path / "second", **options | {"max_steps": 2})
    (said,) = ranks(1, "tests.work.run:train", flags=[*flags, "--resume", "auto"])
    assert "values of the checkpoint" in said and "randomly" not in said
