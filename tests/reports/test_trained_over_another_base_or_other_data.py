"""A base, data or a tokenizer that was replaced under its old name is found, whoever meets it.

Reports: huggingface/peft#1932 (an adapter over another base), NVIDIA-NeMo/RL#2519 and
hiyouga/LlamaFactory#7085 (a resume on rewritten data), huggingface/transformers#26729 (which file
is read is decided by names).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.same_on_all_nodes import fingerprint
from sparse_lora_dist.checkpoint.manifest import sealed
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.run_folder.identity import Identity
from sparse_lora_dist.training import feed
from tests.conftest import Ranks
from tests.export.test_export_program import exported
from tests.fixtures.tiny_run import TinyRun

TRAIN, REFUSAL = "tests.work.run:train", "tests.work.run:refusal"
OPTIONS = {"max_steps": 6, "packing": False, "method": "lora"}


def copied(tiny: TinyRun, folder: Path) -> TinyRun:
    shutil.copytree(tiny.model, folder / "model")
    for file in (tiny.data, tiny.held_out):
        shutil.copy(file, folder / file.name)
    return TinyRun(folder / "model", folder / tiny.data.name, folder / tiny.held_out.name)


def with_other_weights(model: Path) -> None:
    """Another fine-tune: the same names, shapes and sizes."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    flipped = {k: w.flip(0).contiguous() if "proj" in k else w for k, w in tensors.items()}
    save_file(flipped, file, {"format": "pt"})


def rewritten(file: Path) -> None:
    """As many examples, of as many letters, that say something else."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    turned = [row | {"response": row["response"][::-1]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in turned))


@pytest.fixture(scope="module")
def stopped(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, and a run over them after 2 of 6 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    own = copied(tiny, folder)
    ranks(1, TRAIN, flags=own.flags(folder / "run", **OPTIONS, stop_after=2))
    return folder


@pytest.fixture
def mine(stopped: Path, tmp_path: Path) -> TinyRun:
    """A copy of it in which something may be replaced. Its run is that of ``stopped``."""
    own = TinyRun(stopped / "model", stopped / "train.jsonl", stopped / "held_out.jsonl")
    shutil.copytree(stopped / "run", tmp_path / "run")
    return copied(own, tmp_path)


def resumed(own: TinyRun, **options: object) -> list[str]:
    return own.flags(
        own.model.parent / "run", **OPTIONS | {"resume": "auto", "stop_after": 3} | options
    )


def other_data(own: TinyRun) -> None:
    rewritten(own.data)


def fewer_examples(own: TinyRun) -> None:
    own.data.write_text("".join(own.data.read_text().splitlines(keepends=True)[:-5]))


def other_held_out_data(own: TinyRun) -> None:
    rewritten(own.held_out)


def other_weights(own: TinyRun) -> None:
    with_other_weights(own.model)


def another_tokenizer(own: TinyRun) -> None:
    """Two letters have each other's ids."""
    file = own.model / "tokenizer.json"
    about = json.loads(file.read_text())
    ids = about["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]
    file.write_text(json.dumps(about))


def another_template(own: TinyRun) -> None:
    file = own.model / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


@pytest.mark.parametrize(
    ("replace_it", "named", "way_on"),
    [
        (other_weights, "over another base than this run would be", False),
        (other_data, "differs: the tokenised rows of --data, the files of --data.", True),
        (fewer_examples, "differs: the tokenised rows of --data, the files of --data.", True),
        (other_held_out_data, "differs: the tokenised rows of --eval_data.", True),
        (
            another_tokenizer,
            "differs: the tokenizer, the tokenised rows of --data, the token",
            True,
        ),
        (another_template, "differs: the chat template, the tokenised rows of --data, the t", True),
    ],
)
def test_a_resume_after_something_was_replaced_is_refused_and_names_it(
    ranks: Ranks, mine: TinyRun, replace_it: Callable[[TinyRun], None], named: str, way_on: bool
) -> None:
    replace_it(mine)
    (said,) = ranks(1, REFUSAL, flags=resumed(mine))
    assert named in said
    assert ("--reset data" in said) == way_on


def test_other_data_on_purpose_and_a_file_that_only_looks_different(
    ranks: Ranks, mine: TinyRun, tmp_path: Path
) -> None:
    """The columns that nobody reads may change, and the base may lie elsewhere in other files."""
    rows = [json.loads(line) for line in mine.data.read_text().splitlines()]
    mine.data.write_text("".join(json.dumps({"id": 1} | row) + "\n" for row in rows))
    elsewhere = replace(mine, model=in_two_files(mine.model, tmp_path / "elsewhere"))
    (said,) = ranks(1, TRAIN, flags=resumed(elsewhere))
    assert "changed, but all rows are the same: the files of --data\n" in said
    other_data(mine)
    other_held_out_data(mine)
    step = tmp_path / "run" / "checkpoints" / "step_00000003"
    flags = mine.flags(tmp_path / "on", **OPTIONS, resume=step, reset="data", stop_after=4)
    (said,) = ranks(1, TRAIN, flags=flags)
    assert "step 3; " in said and "reset: data" in said


def in_two_files(model: Path, to: Path) -> Path:
    """The same model with its tensors in two files and an index."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({n: tensors[n] for n in own}, to / file, {"format": "pt"})
    where = {name: file for file, own in halves.items() for name in own}
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return to


def test_a_merge_onto_another_fine_tune_of_the_same_shapes_is_refused(
    mine: TinyRun, tmp_path: Path
) -> None:
    merged = ["--format", "merged", "--base", str(mine.model)]
    exported(tmp_path / "run", tmp_path / "merged", *merged)
    with_other_weights(mine.model)
    with pytest.raises(UserError, match="differs: the weights of the base. Give an unchanged copy"):
        exported(tmp_path / "run", tmp_path / "other", *merged)
    assert not (tmp_path / "other").exists()


def test_runs_over_two_fine_tunes_are_not_added(
    ranks: Ranks, mine: TinyRun, tmp_path: Path
) -> None:
    with_other_weights(mine.model)
    ranks(1, TRAIN, flags=mine.flags(tmp_path / "other", **OPTIONS, stop_after=1))
    first = Trained.open(tmp_path / "run")
    with pytest.raises(UserError, match="What differs: the weights of the base. Only"):
        Union.of(first, [str(tmp_path / "other")])


def test_an_adapter_is_evaluated_over_the_base_it_was_trained_over(
    ranks: Ranks, mine: TinyRun, tmp_path: Path
) -> None:
    export = exported(tmp_path / "run", tmp_path / "export")
    shutil.copytree(export, tmp_path / "alone")
    (tmp_path / "alone" / "trained_over.json").unlink()
    with_other_weights(mine.model)
    for adapter in (tmp_path / "run", tmp_path / "run" / "adapter", export):
        asked = {"model": mine.model, "adapter": adapter, "eval_data": mine.held_out}
        words = [w for k, v in (asked | {"metrics": "loss"}).items() for w in (f"--{k}", str(v))]
        (said,) = ranks(1, "tests.work.eval:complaint", flags=words)
        assert f"The adapter {adapter} was trained over another base than --model" in said
        assert "What differs: the weights of the base." in said
    words[words.index(str(export))] = str(tmp_path / "alone")
    (said,) = ranks(1, "tests.work.eval:evaluate", flags=words)
    assert "trained with" not in said


@pytest.mark.parametrize("exports", [False, True])
def test_an_evaluation_with_another_tokenizer_says_so(
    ranks: Ranks, mine: TinyRun, tmp_path: Path, exports: bool
) -> None:
    adapter = tmp_path / "run"
    if exports:
        adapter = exported(tmp_path / "run", tmp_path / "export")
    another_tokenizer(mine)
    asked = {"model": mine.model, "adapter": adapter, "eval_data": mine.held_out, "metrics": "loss"}
    words = [w for k, v in asked.items() for w in (f"--{k}", str(v))]
    (said,) = ranks(1, "tests.work.eval:evaluate", flags=words)
    assert "note      the tokenizer is not the one that the adapter was trained with\n" in said


def test_what_was_saved_before_this_was_stored_goes_on_and_says_so(
    ranks: Ranks, mine: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = (tmp_path / "run").glob("checkpoints/step_*/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["description"]["identity"]
    path.write_text(sealed(manifest))
    exported(tmp_path / "run", tmp_path / "old", "--format", "merged", "--base", str(mine.model))
    assert "same cannot be compared" in capsys.readouterr().out
    (said,) = ranks(1, TRAIN, flags=resumed(mine))
    assert f"{path.parent} was saved by a version that did not store" in said


def test_the_base_may_go_away_after_it_was_loaded(
    ranks: Ranks, mine: TinyRun, tmp_path: Path
) -> None:
    """Scratch was cleaned, or the hub's cache: what is saved still names the base it began with."""
    words = mine.flags(tmp_path / "lost", **OPTIONS)
    ranks(1, "tests.work.run:train_and_lose_the_base", flags=words, base=mine.model)
    saved, began = (Trained.open(tmp_path / name).manifest for name in ("lost", "run"))
    assert saved["description"]["identity"] == began["description"]["identity"]


def test_an_export_that_skips_a_damaged_checkpoint_says_so(
    mine: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (intact,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    newer = shutil.copytree(intact, intact.with_name("step_00000009"))
    file = newer / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    exported(tmp_path / "run", tmp_path / "export")
    said = capsys.readouterr().out
    assert f"skipped   {newer}" in said
    assert f"from      {intact}" in said


# Which weights are read.


def weights(folder: Path) -> torch.Tensor:
    return CheckpointFiles(folder).whole("w")


def folder_of(tmp_path: Path, *names: str) -> Path:
    """Files of one tensor w each, whose value is the place of the file's name."""
    for value, name in enumerate(names):
        save_file({"w": torch.full((4,), float(value))}, tmp_path / name)
    return tmp_path


def index(folder: Path, file: str) -> None:
    text = json.dumps({"weight_map": {"w": file}})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_new_single_file_beside_old_shards_is_read_as_transformers_does(tmp_path: Path) -> None:
    folder_of(tmp_path, "model-00001-of-00001.safetensors", "model.safetensors")
    index(tmp_path, "model-00001-of-00001.safetensors")
    assert weights(tmp_path).tolist() == [1.0] * 4
    assert CheckpointFiles(tmp_path).passed_over == ("model.safetensors.index.json",)
    (tmp_path / "model.safetensors").unlink()
    assert weights(tmp_path).tolist() == [0.0] * 4
    assert CheckpointFiles(tmp_path).passed_over == ()


def test_an_index_of_the_single_file_is_no_second_choice(tmp_path: Path) -> None:
    folder_of(tmp_path, "model.safetensors")
    index(tmp_path, "model.safetensors")
    assert CheckpointFiles(tmp_path).passed_over == ()


def test_the_file_that_config_json_names_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "model.safetensors", "other.safetensors")
    named = tmp_path / "config.json"
    named.write_text('{"transformers_weights": "other.safetensors"}')
    assert weights(tmp_path).tolist() == [1.0] * 4
    assert CheckpointFiles(tmp_path).passed_over == ("model.safetensors",)
    for wrong in ("../other.safetensors", "gone.safetensors", "weights.bin"):
        named.write_text(json.dumps({"transformers_weights": wrong}))
        with pytest.raises(UserError, match="transformers_weights"):
            CheckpointFiles(tmp_path)


def test_the_fingerprint_of_a_base_is_of_its_content(tiny: TinyRun, tmp_path: Path) -> None:
    def of(folder: Path) -> tuple[str, str]:
        found = fingerprint(folder, CheckpointFiles(folder))
        return found.config, found.weights

    usual = of(tiny.model)
    assert of(in_two_files(tiny.model, tmp_path / "two")) == usual
    other = Path(shutil.copytree(tiny.model, tmp_path / "other"))
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"transformers_version": "9"}, indent=7))
    assert of(other) == usual
    with_other_weights(other)
    assert of(other)[0] == usual[0] and of(other)[1] != usual[1]
    (other / "config.json").write_text(json.dumps(about | {"rms_norm_eps": 0.5}))
    assert of(other)[0] != usual[0]


def test_nodes_that_read_other_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node has a disk of its own, and one of them an older copy."""
    first = Identity(data="all 2 documents, sha256 a", tokenizer="t")
    old = replace(first, data="all 2 documents, sha256 b")
    for found, said in (([first, None, first], None), ([first, None, old], "rank 2 and rank 0 d")):
        monkeypatch.setattr(feed.comm, "gather_objects", lambda own, found=found: found)
        if said is None:
            assert feed.same_on_all_nodes(first) == first
        else:
            with pytest.raises(UserError, match=f"{said}iffer in the tokenised rows of --data"):
                feed.same_on_all_nodes(first)
