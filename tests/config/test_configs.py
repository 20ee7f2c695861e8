"""configs/: each file is read by its program, and the planner says that it fits its GPU."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sweep import load_grid
from sparse_lora_dist.editing.edit_options import load_request as load_edit
from sparse_lora_dist.plan.output import Outcome, as_json
from sparse_lora_dist.plan.plan_options import load_request as load_plan
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks
from sparse_lora_dist.plan.shapes import shapes_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
LLAMA_70B = ROOT / "assets" / "plans" / "llama-3-70b"
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
"""What Llama 3 8B's config.json has instead of 70B's."""

MACHINES: dict[str, dict[str, Any]] = {
    "demo": {"world_size": 1, "gpu_memory": "24GB"},
    "llama_8b_24gb": {"world_size": 1, "gpu_memory": "24GB"},
    "llama_70b_8x24gb": {"world_size": 8, "gpu_memory": "24GB"},
    "llama_70b_1x24gb_offload": {"world_size": 1, "gpu_memory": "24GB", "host_memory": "64GB"},
    "llama_70b_2_nodes": {"world_size": 16, "nodes": 2, "gpu_memory": "24GB"},
    "classification": {"world_size": 1, "gpu_memory": "24GB"},
    "facts_edited": {"world_size": 1, "gpu_memory": "24GB"},
    "sweep": {"world_size": 1, "gpu_memory": "24GB"},
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the files name ds_configs/ from there


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    config = json.loads((LLAMA_70B / "config.json").read_text()) | LLAMA_8B
    (tmp_path / "llama-3-8b").mkdir()
    (tmp_path / "llama-3-8b" / "config.json").write_text(json.dumps(config))
    return tmp_path / "llama-3-8b"


def model_of(name: str, llama_8b: Path) -> list[str]:
    """The flag that replaces a hub model by a folder with its config.json."""
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    if model == "default":
        return []
    return ["--model", str(LLAMA_70B if model.endswith("70B") else llama_8b)]


def words_of(name: str, llama_8b: Path, tmp_path: Path) -> list[str]:
    """The command line that starts the (first) run of a file."""
    path = str(CONFIGS / f"{name}.yaml")
    if name == "sweep":
        return next(iter(load_grid([path]).runs.values()))
    return ["--config", path, *model_of(name, llama_8b)]


def edits(tmp_path: Path) -> list[str]:
    one = {"subject": "A", "prompt": "A lives in", "target_new": "B", "portability": {}}
    (tmp_path / "edits.json").write_text(json.dumps([one | {"locality": {}}]))
    return ["--edits", str(tmp_path / "edits.json")]


def planned(words: list[str]) -> dict[str, Any]:
    request = load_plan(words)
    ranks = Ranks(
        world_size=request.plan.world_size,
        nodes=request.plan.nodes,
        on_gpu=request.plan.gpu_bytes > 0,
    )
    ways = {"whole_logits": request.plan.whole_logits, "on_gpu": ranks.on_gpu}
    shapes, engine = shapes_of(request.config, **ways), PlannedEngine.of(request.engine)
    return as_json(Outcome(shapes=shapes, engine=engine, ranks=ranks, plan=request.plan))


def test_every_file_is_tested_and_in_the_table() -> None:
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    assert names == set(MACHINES)
    assert set(re.findall(r"`(\w+)\.yaml`", (CONFIGS / "README.md").read_text())) == names


@pytest.mark.parametrize("name", MACHINES)
def test_a_file_is_read_by_its_program(name: str, llama_8b: Path, tmp_path: Path) -> None:
    words = words_of(name, llama_8b, tmp_path)
    if name == "facts_edited":
        config = load_edit([*words, *edits(tmp_path)]).config
        assert config.adapter.method == "roselora"
    else:
        config = load_config(words)
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    flat = config.as_flat_dict()
    for option, value in content.items():
        if option not in ("model", "output_dir") and not isinstance(value, list):
            assert flat[option] == (float(value) if option == "learning_rate" else value)


@pytest.mark.parametrize("name", MACHINES)
def test_a_run_fits_the_gpu_it_is_for(name: str, llama_8b: Path, tmp_path: Path) -> None:
    words = words_of(name, llama_8b, tmp_path)
    if name == "facts_edited":  # the planner does not have the editor's defaults
        flat = load_edit([*words, *edits(tmp_path)]).config.as_flat_dict()
        (tmp_path / "edit.yaml").write_text(yaml.safe_dump(flat))
        words = ["--config", str(tmp_path / "edit.yaml")]
    machine = [word for key, value in MACHINES[name].items() for word in (f"--{key}", str(value))]
    found = planned([*words, *machine])
    assert found["fits"], found["need"]
    page = (CONFIGS / "README.md").read_text()
    (written,) = re.findall(rf"^\| `{name}\.yaml` .* ([\d.]+) GB \|$", page, re.MULTILINE)
    assert written == f"{found['need']['gpu'] / 1e9:.1f}"


@pytest.mark.parametrize("name", MACHINES)
def test_a_file_starts_with_its_purpose_and_its_command(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert 2 <= len(comment) <= 3 and lines[: len(comment)] == comment
    assert f"configs/{name}.yaml" in "\n".join(comment)
