"""What a user may get wrong: one message that every rank agrees on, before any weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun

REFUSAL = "tests.work.run:refusal"
Change = Callable[[Path], None]


def rewritten(**tensors: Any) -> Change:
    """The weights with some tensors replaced, or left out where None."""

    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        for name, new in tensors.items():
            key = name.replace("__", ".")
            old = weights.pop(key)
            if new is not None:
                weights[key] = new(old).contiguous()
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return change


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt_header(model: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"x" * 32
    file.write_bytes(content)


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def index_of_a_missing_tensor(model: Path) -> None:
    names = [*load_file(model / "model.safetensors"), "model.layers.9.x.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


NORM = "model__norm__weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut_short, ["is cut short", "model.safetensors"]),
        (corrupt_header, ["model.safetensors", "header"]),
        (no_weights, ["holds no model.safetensors"]),
        (no_config, ["has no config.json"]),
        (index_of_a_missing_tensor, ["'model.layers.9.x.weight'"]),
        (rewritten(**{NORM: None}), ["no tensor 'model.norm.weight'"]),
        (rewritten(**{NORM: lambda t: t[:10]}), ["[10]", "[64]"]),
        (rewritten(**{NORM: lambda t: t.int()}), ["I32", "'model.norm.weight'"]),
    ],
    ids=["cut", "header", "no-weights", "no-config", "index", "missing", "shape", "dtype"],
)
def test_a_damaged_model(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, change: Change, said: list[str]
) -> None:
    model = copy_of(tiny.model, tmp_path / "model")
    change(model)
    messages = ranks(2, REFUSAL, flags=tiny.flags(tmp_path / "run", model=model))
    for message in messages:
        assert all(part in message for part in said), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "./nowhere"}, ["--model ./nowhere does not exist"]),
        ({"target_modules": "qq_proj"}, ["qq_proj", "q_proj", "down_proj"]),
        ({"target_modules": ".*nothing.*"}, [".*nothing.*", "q_proj"]),
        ({"target_modules": "q_proj,k_prj"}, ["k_prj"]),
        ({"rank": 33}, ["--rank 33", "32 x 64"]),
        ({"modules_to_save": "lm_haed"}, ["lm_haed", "lm_head"]),
        ({"warmup_steps": 30, "max_steps": "null", "num_epochs": 1}, ["--warmup_steps 30"]),
        ({"attn_implementation": "quick"}, ["quick"]),
        ({"resume": "./nowhere"}, ["./nowhere"]),
    ],
    ids=[
        "model",
        "no-match",
        "regex",
        "one-of-two",
        "rank",
        "full",
        "warmup",
        "attention",
        "resume",
    ],
)
def test_options_that_do_not_fit_the_model(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, options: dict[str, object], said: list[str]
) -> None:
    for message in ranks(2, REFUSAL, flags=tiny.flags(tmp_path / "run", **options)):
        assert all(part in message for part in said), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", "respo\n', [".jsonl:2:", "JSON"]),
        ("", ["empty"]),
        ('{"prompt": "a", "answer": "b"}\n', ["answer"]),
        ('{"prompt": "a", "response": "%s"}\n' % ("long " * 30), ["64"]),
    ],
    ids=["broken", "empty", "fields", "all-too-long"],
)
def test_data_that_cannot_be_used(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, text: str, said: list[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    for message in ranks(2, REFUSAL, flags=tiny.flags(tmp_path / "run", data=data)):
        assert str(data) in message
        assert all(part in message for part in said), message
    assert not (tmp_path / "run").exists()


def test_an_example_that_is_too_long_is_counted_and_said(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    long = json.dumps({"prompt": "a", "response": "long " * 30})
    data.write_text(tiny.data.read_text() + long + "\n")
    said, _ = ranks(
        2, "tests.work.run:train", flags=tiny.flags(tmp_path / "run", data=data, max_steps=1)
    )
    assert "40 documents" in said
    assert "1 too long" in said or "1 longer" in said or "1 left out" in said, said


@pytest.fixture(scope="module")
def finished(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    ranks(2, "tests.work.run:train", flags=tiny.flags(folder, max_steps=2))
    return folder


def test_the_folder_of_another_run_is_not_written_to(
    ranks: Ranks, tiny: TinyRun, finished: Path
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    for message in ranks(2, REFUSAL, flags=tiny.flags(finished, max_steps=4)):
        assert f"--output_dir {finished} already holds a run" in message
        assert "--resume auto" in message
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, ["seed was 0, now 1"]),
        ({"quantization": "none"}, ["quantization was 'nf4', now 'none'"]),
        ({"alpha": 8.0, "sequence_length": 32}, ["alpha was 32.0", "sequence_length was 64"]),
        ({"rank": 8}, ["rank"]),
        ({"target_modules": "q_proj"}, ["target_modules"]),
    ],
    ids=["seed", "quantization", "two", "rank", "targets"],
)
def test_a_run_is_not_resumed_as_another_one(
    ranks: Ranks,
    tiny: TinyRun,
    finished: Path,
    tmp_path: Path,
    options: dict[str, object],
    said: list[str],
) -> None:
    checkpoint = finished / "checkpoints" / "step_00000002"
    flags = tiny.flags(tmp_path / "run", max_steps=4, resume=checkpoint, **options)
    for message in ranks(2, REFUSAL, flags=flags):
        assert all(part in message for part in said), message


def test_a_damaged_checkpoint_is_named(
    ranks: Ranks, tiny: TinyRun, finished: Path, tmp_path: Path
) -> None:
    checkpoint = copy_of(finished / "checkpoints" / "step_00000002", tmp_path / "step")
    file = checkpoint / "rank_00001.safetensors"
    flags = tiny.flags(tmp_path / "run", max_steps=4, resume=checkpoint)
    file.write_bytes(file.read_bytes()[:-10])
    for message in ranks(2, REFUSAL, flags=flags):
        assert str(file) in message and "manifest" in message
    (checkpoint / "manifest.json").unlink()
    for message in ranks(2, REFUSAL, flags=flags):
        assert f"{checkpoint} is not a checkpoint" in message


def test_a_damaged_tokenizer(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    model = copy_of(tiny.model, tmp_path / "model")
    (model / "tokenizer.json").write_text("{ not json")
    flags = tiny.flags(tmp_path / "run", model=model)
    for said in ranks(2, REFUSAL, flags=flags):
        assert f"--model {model}" in said and "cannot be opened" in said


def test_a_damaged_adapter_to_start_from(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    ranks(1, "tests.work.run:train", flags=tiny.flags(tmp_path / "first", max_steps=1))
    adapter = tmp_path / "first" / "adapter"
    flags = tiny.flags(tmp_path / "second", init_adapter=adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (said,) = ranks(1, REFUSAL, flags=flags)
    assert f"--init_adapter {adapter} is damaged" in said
    (adapter / "adapter_config.json").write_text("{")
    (said,) = ranks(1, REFUSAL, flags=flags)
    assert f"--init_adapter {adapter} is damaged" in said


def test_a_checkpoint_that_was_altered(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path, max_steps=2, resume="auto")
    ranks(2, "tests.work.run:train", flags=flags)
    checkpoint = tmp_path / "checkpoints" / "step_00000002"
    file = checkpoint / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # one bit of a number: sizes and header stay right
    file.write_bytes(content)
    for said in ranks(2, REFUSAL, flags=[*flags, "--resume", str(checkpoint)]):
        assert "rank_00001.safetensors was altered after it was saved" in said
        assert "Resume from another step" in said


def test_a_resume_of_another_run_is_refused_before_a_weight_is_read(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, max_steps=2, resume="auto")
    ranks(1, "tests.work.run:train", flags=flags)
    for option, word in (
        ("--rank", "differ between this run and"),
        ("--seed", "seed was 0, now 8"),
    ):
        (said,) = ranks(1, "tests.work.run:refusal_unread", flags=[*flags, option, "8"])
        assert word in said
