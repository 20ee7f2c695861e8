"""Users kept secrets, backups and the state of a training beside a base, and uploaded them with a
merged model."""

from pathlib import Path

import pytest

from sparse_lora_dist.export import merged_files
from sparse_lora_dist.export.merged_files import files_to_copy

OF_THE_MODEL = """
    config.json tokenizer.json tokenizer_config.json generation_config.json chat_template.jinja
    preprocessor_config.json vocab.txt merges.txt LICENSE modeling_mine.py scheduler.py
    latest_news.txt optimizers.md
""".split()
HIDDEN = [".env", ".gitattributes", ".netrc", ".config.json.swp"]
BACKUPS = [*(f"config.json{end}" for end in (".bak", "~", ".orig", ".swo")), "#config.json#"]
OF_A_TRAINING = """
    trainer_state.json training_args.json optimizer.safe scheduler rng_state_0.pkl
    random_states_0.pkl scaler.pkl events.out.tfevents.1700000000.host.1.0 latest zero_to_fp32.py
    trainer_log.jsonl all_results.json
""".split()
QUANTISED = ["hf_quant_config.json", "quantize_config.json", "quant_config.json"]
OTHERS = [*HIDDEN, *BACKUPS, *OF_A_TRAINING, *QUANTISED]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in (*OF_THE_MODEL, "model.safetensors", "README.md", "training_args.bin"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_part_of_the_model_is_not_copied(base: Path, name: str) -> None:
    (base / name).write_text("HF_TOKEN=hf_secret")
    assert sorted(path.name for path in files_to_copy(base)) == sorted(OF_THE_MODEL)


def test_one_line_names_what_was_left_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*OTHERS, ".sparse_lora_dist.json"):
        (base / name).write_text("HF_TOKEN=hf_secret")
    (base / ".git").mkdir()
    (tmp_path / "merged").mkdir()
    merged_files.copy_from(base, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == set(OF_THE_MODEL)
    (said,) = capsys.readouterr().out.splitlines()
    assert said == f"left out  {', '.join(sorted(OTHERS))} of {base}: no part of the model"


def test_nothing_is_said_of_a_base_that_is_a_model_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "merged").mkdir()
    merged_files.copy_from(base, tmp_path / "merged")
    assert capsys.readouterr().out == ""


def test_a_broken_link_of_what_is_left_out_does_not_matter(base: Path) -> None:
    (base / ".env").symlink_to("gone")
    assert sorted(path.name for path in files_to_copy(base)) == sorted(OF_THE_MODEL)
