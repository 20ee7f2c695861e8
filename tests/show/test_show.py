"""The table of an adapter and of a checkpoint: its numbers are those of the tensors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_lora_dist.checkpoint import read_manifest
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import PlainLora, write_peft
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import LowRank
from sparse_lora_dist.report.ranks import Shares
from sparse_lora_dist.report.run_data import read_run
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.show import checkpoint_table as checkpoint
from sparse_lora_dist.show import peft_table as peft_adapter
from sparse_lora_dist.show.show_command import as_text
from sparse_lora_dist.show.table import Module, table
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun

ROOT = Path(__file__).parents[2]
PREFIX = "base_model.model.model.layers."


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pair(name: str, rank: int = 4, inputs: int = 6, outputs: int = 5) -> dict[str, Tensor]:
    a_RI, b_OR = torch.randn(rank, inputs), torch.randn(outputs, rank)
    return {f"{PREFIX}{name}.lora_A.weight": a_RI, f"{PREFIX}{name}.lora_B.weight": b_OR}


def found(folder: Path) -> dict[str, Module]:
    config = peft_adapter.read_config(folder)
    return {m.name: m for m in peft_adapter.modules(folder, config)}


def test_rank_density_bytes_and_norm_are_those_of_the_tensors(tmp_path: Path) -> None:
    tensors = pair("0.q_proj")
    a_RI, b_OR = tensors.values()
    a_RI[1] = 0.0  # no row
    b_OR[:, 3] = 0.0  # no column
    a_RI[0, :2] = 0.0  # a component that is sparse, but in use
    module = found(write_adapter(tmp_path / "a", tensors))["model.layers.0.q_proj"]
    assert (module.rank, module.capacity) == (2, 4)
    assert (module.alive, module.entries, module.bytes) == (44 - 6 - 5 - 2, 44, 176)
    assert module.norm == pytest.approx(float(2.0 * (b_OR @ a_RI).norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 8 / 2),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 3}}, 3 / 2),
        ({"alpha_pattern": {"k_proj": 3}}, 8 / 2),
        ({"alpha_pattern": {r"model\.layers\.0\..*": 3}}, 3 / 2),
    ],
)
def test_the_scale_is_that_of_the_module(
    tmp_path: Path, config: dict[str, Any], scale: float
) -> None:
    tensors = pair("0.q_proj", rank=2)  # not that of the config: rank_pattern
    a_RI, b_OR = tensors.values()
    (module,) = found(write_adapter(tmp_path / "a", tensors, **config)).values()
    assert module.norm == pytest.approx(LowRank(a_LI=a_RI, b_OL=b_OR, scale=scale).norm)


def test_layers_are_in_order_and_what_trained_in_full_comes_last(tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": torch.tensor([[1.0, 0.0]])}
    tensors = head | pair("10.q_proj") | pair("9.q_proj")
    modules = found(write_adapter(tmp_path / "a", tensors))
    assert list(modules) == ["model.layers.9.q_proj", "model.layers.10.q_proj", "score.weight"]
    last = modules["score.weight"]
    assert (last.rank, last.norm, last.alive, last.entries) == (None, None, 1, 2)
    text = table(list(modules.values()))
    assert [line.split()[:2] for line in text.splitlines()[3:]] == [
        ["score.weight", "full"],
        ["3", "modules"],
    ]


def test_a_norm_that_is_no_number_is_said_to_be_none(tmp_path: Path) -> None:
    tensors = pair("0.q_proj") | pair("1.q_proj")
    tensors[f"{PREFIX}0.q_proj.lora_B.weight"][0, 0] = torch.nan
    lines = as_text(write_adapter(tmp_path / "a", tensors)).splitlines()
    assert [line.split()[-1] == "nan" for line in lines[2:]] == [True, False, True]


def test_an_export_of_one_rank_for_all_has_what_was_trained_in_full_too(tmp_path: Path) -> None:
    a_LI, b_OL = pair("0.q_proj").values()
    head = torch.ones(2, 6)
    trained = PlainLora(
        pairs={"q_proj": (a_LI, b_OL)},
        full={"score.weight": head},
        full_modules=["score"],
        rank=4,
        alpha=8.0,
        dropout=0.0,
        base="tiny",
        task_type="SEQ_CLS",
    )
    write_peft(tmp_path / "a", trained, uniform=True)
    modules = found(tmp_path / "a")
    assert list(modules) == ["q_proj", "score.weight"]
    assert (modules["score.weight"].entries, modules["score.weight"].bytes) == (12, 48)


@pytest.fixture(scope="module")
def real(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, gates in the middle of their way, and a head that trains in full."""
    folder = tmp_path_factory.mktemp("show") / "real"
    flags = tiny.flags(folder, method="sora", max_steps=6, sora_reopen="false", alpha=6)
    ranks(2, "tests.work.run:train", flags=[*flags, "--modules_to_save", "lm_head"])
    return folder


def test_a_checkpoint_has_the_norms_and_ranks_of_the_adapter_it_became(real: Path) -> None:
    saved = real / "checkpoints" / "step_00000006"
    modules = {m.name: m for m in checkpoint.modules(Trained.open(saved))}
    exported = found(real / "adapter")
    assert len(modules) == 15
    lives = {name for name, m in modules.items() if m.norm != 0}
    assert set(exported) == lives and len(lives) < 15, "linears without a component are left out"
    assert modules["lm_head.weight"].rank is None and modules["lm_head.weight"].norm is None
    weights = load_file(real / "adapter" / "adapter_model.safetensors")
    last = read_records(real / "decisions.jsonl")[-1]
    for name, rank in last["ranks"].items():
        # A gate that is zero is stepped still, and counts for nothing.
        assert modules[name].rank == rank
        assert 0 <= last["live"][name] - modules[name].alive <= rank
        if name not in exported:
            continue
        a_RI, b_OR = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        dense = float((6 / 4 * b_OR.double() @ a_RI.double()).norm())
        assert modules[name].norm == pytest.approx(dense, rel=1e-5, abs=1e-12)
        assert exported[name].norm == pytest.approx(dense, rel=1e-5, abs=1e-12)
    assert 0 < sum(last["ranks"].values()) < 4 * 14


def test_what_is_zeroed_after_every_step_does_not_count_as_alive(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path / "run", method="roselora", max_steps=6, roselora_keep=0.25)
    ranks(2, "tests.work.run:train", flags=[*flags, "--roselora_preset", "released"])
    saved = Trained.open(tmp_path / "run")
    for module in checkpoint.modules(saved):
        tensors = (saved.tensor(f"{module.name}.{name}") for name in ("lora_a", "lora_b"))
        assert module.alive == sum(int(t.count_nonzero()) for t in tensors)
        assert 0.2 < module.alive / module.entries < 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"method": "prilora", "rank": 3, "prilora_every": 2},
        {"method": "melora", "rank": 3, "melora_ranks": "1,4"},
    ],
)
def test_a_linear_whose_rank_is_not_the_runs_is_told_with_its_own(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, options: dict[str, object]
) -> None:
    """In the table, in decisions and on the report's map: as many as its A has rows."""
    flags = tiny.flags(tmp_path / "run", max_steps=2, **options)
    ranks(2, "tests.work.run:train", flags=flags)
    saved = Trained.open(tmp_path / "run")
    own = {site.name: len(saved.tensor(f"{site.name}.lora_a")) for site in saved.sites}
    assert set(own.values()) == ({1, 5} if options["method"] == "prilora" else {5})
    told = {m.name: (m.rank, m.capacity) for m in checkpoint.modules(saved)}
    assert told == {name: (rank, rank) for name, rank in own.items()}
    assert {name: m.capacity for name, m in found(tmp_path / "run" / "adapter").items()} == own
    if options["method"] == "prilora":
        assert read_records(tmp_path / "run" / "decisions.jsonl")[-1]["ranks"] == own
        shares = Shares(read_run(tmp_path / "run"))
        assert (shares.of_ranks, shares.capacity) == (True, 5)


def test_bytes_of_a_checkpoint_are_those_of_its_files(real: Path) -> None:
    saved = real / "checkpoints" / "step_00000006"
    manifest = read_manifest(saved)
    expected = 0
    for file in manifest["files"]:
        content = (saved / file["name"]).read_bytes()
        random_state = load_file(saved / file["name"])["rng/cpu"].nbytes
        header = 8 + int.from_bytes(content[:8], "little")
        expected += len(content) - header - random_state
    assert sum(m.bytes for m in checkpoint.modules(Trained.open(saved))) == expected


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda a: (a / "adapter_config.json").unlink(), "neither an adapter"),
        (
            lambda a: (a / "adapter_config.json").write_text("{"),
            r"adapter_config\.json is not valid JSON",
        ),
        (
            lambda a: (a / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            "the adapter is not plain LoRA",
        ),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (
            lambda a: (a / "adapter_model.safetensors").write_bytes(b"\0" * 9),
            "is damaged: SafetensorError",
        ),
        (
            lambda a: save_file(
                {f"{PREFIX}0.q.lora_A.weight": torch.zeros(1, 1)}, a / "adapter_model.safetensors"
            ),
            "has lora_A only",
        ),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, spoil: Any, said: str) -> None:
    adapter = write_adapter(tmp_path / "a", pair("0.q_proj"))
    spoil(adapter)
    with pytest.raises(UserError, match=said):
        as_text(adapter)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": None}, "alpha 'lora_alpha' must be a number, got None"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha 'q_proj' must be a number, got '8'"),
        ({"alpha_pattern": {"q_(proj": 8}}, "alpha_pattern must be names or a regular"),
        ({"alpha_pattern": [8]}, "alpha_pattern must map names to numbers"),
        ({"use_dora": True}, "has use_dora"),
        ({"use_qalora": True}, "has use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "has use_bdlora"),
        ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "has target_parameters"),
        ({"kasa_config": None, "monteclora_config": {"n": 1}}, "has monteclora_config"),
        ({"kasa_config": {}}, "has kasa_config"),  # PEFT: KaSA with its defaults
    ],
)
def test_an_adapter_whose_update_is_not_b_a_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    adapter = write_adapter(tmp_path / "a", pair("0.q_proj"), **config)
    with pytest.raises(UserError, match=re.escape(said)):
        as_text(adapter)


@pytest.mark.parametrize("other", ["lora_B.bias", "lora_magnitude_vector.weight", "lora_diag"])
def test_a_tensor_that_changes_the_update_is_refused(tmp_path: Path, other: str) -> None:
    tensors = pair("0.q_proj") | {f"{PREFIX}0.q_proj.{other}": torch.ones(5)}
    with pytest.raises(UserError, match=rf"holds .*{other}, so it is not plain LoRA"):
        as_text(write_adapter(tmp_path / "a", tensors))


def test_a_checkpoint_that_is_cut_short_is_refused(real: Path, tmp_path: Path) -> None:
    saved = shutil.copytree(real / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    file = saved / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"rank_00001\.safetensors has"):
        as_text(saved)


def test_the_program_prints_the_table_and_refuses_a_run_by_what_to_name(real: Path) -> None:
    def typed(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launcher/show.py"), str(path)]
        return subprocess.run(command, capture_output=True, text=True)

    shown, refused = typed(real / "adapter"), typed(real)
    assert shown.returncode == 0 and shown.stdout.startswith(f"adapter   {real}/adapter: LoRA of")
    assert len(shown.stdout.splitlines()) == 2 + len(found(real / "adapter")) + 1
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {real} is a run folder. Give {real}/adapter")
