"""launcher/export.py: from checkpoints of real runs to what PEFT and transformers make of them."""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from sparse_lora_dist.adapter.peft_config import APART, WEIGHTS
from sparse_lora_dist.checkpoint.manifest import sealed
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request
from sparse_lora_dist.export.merged import Merge
from sparse_lora_dist.export.peft_adapter import NoPair
from sparse_lora_dist.export.sparse_delta import (
    Sparsity,
    apply_sparse_delta,
    nonzeros,
)
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import LowRank
from sparse_lora_dist.methods import METHODS
from tests.conftest import Ranks
from tests.fixtures.reference import whole_model
from tests.fixtures.tiny_classifier import save_base, write_labelled
from tests.fixtures.tiny_run import TinyRun
from tests.laws import LAWS
from tests.tiers import in_full

TOKENS_MT = torch.arange(2 * 24).view(2, 24) * 5 % 250
LOGITS = "tests.work.run:trained_logits"


def exported(source: Path, output: Path, *flags: str) -> Path:
    export(load_request([str(source), "--output", str(output), *flags]))
    return output


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS_MT).logits.float()


def with_peft(tiny: TinyRun, adapter: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's, of keys that are missing or left over
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # of its sparse tensors
        base = whole_model(tiny.model, quantization="nf4")
        return logits_of(peft.PeftModel.from_pretrained(base, str(adapter)))


@dataclass(frozen=True)
class Stop:
    """A checkpoint, and the logits of the engine that saved it."""

    path: Path
    logits: Tensor


@pytest.fixture(scope="module")
def stops(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Method -> its run: stopped amid its schedule on some ranks, and at its end on others."""
    found: dict[str, list[Stop]] = {}

    def run(name: str) -> list[Stop]:
        if name in found:
            return found[name]
        number = list(METHODS).index(name)
        folder = tmp_path_factory.mktemp(name) / "run"
        for world, last in ((1 + number % 4, 5), (1 + (number + 2) % 4, 12)):
            options: dict[str, Any] = {
                "method": name,
                "max_steps": 12,
                "rank": 6,
                "stop_after": last,
            }
            options |= {"micro_batch_size": 12 // world, "resume": "auto", "learning_rate": 2e-3}
            flags = tiny.flags(folder, **options | LAWS[name].on)
            logits = ranks(world, LOGITS, flags=flags, input_ids_MT=TOKENS_MT)[0]
            path = folder / "checkpoints" / f"step_{last:08d}"
            found.setdefault(name, []).append(Stop(path, logits))
        return found[name]

    return run


AMID, END = "amid its schedule", "at its end"
EVERYDAY = [
    *product(("adalora", "cola", "lora", "sora"), (AMID,)),
    *product(("increlora", "neat", "pst", "roselora", "shira"), (END,)),
]
"""Methods and moments that ``make test`` exports."""


@pytest.mark.parametrize(
    ("name", "when"),
    [row if row in EVERYDAY else in_full(*row) for row in product(METHODS, (AMID, END))],
)
def test_what_is_exported_computes_the_trained_logits(
    stops: Any, tiny: TinyRun, tmp_path: Path, name: str, when: str
) -> None:
    stop: Stop = stops(name)[when == END]
    merged = exported(stop.path, tmp_path / "merged", "--format", "merged", "--dtype", "fp32")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.dtype == torch.float32
    assert logits_of(model).numpy() == pytest.approx(stop.logits.numpy(), abs=1e-4)
    assert (merged / "tokenizer.json").exists()
    if LAWS[name].peft_type is not None:
        flags = ["--own_type"] if LAWS[name].is_pair else []
        own = exported(stop.path, tmp_path / "own", *flags)
        config = json.loads((own / "adapter_config.json").read_text())
        assert config["peft_type"] == LAWS[name].peft_type
        assert with_peft(tiny, own).numpy() == pytest.approx(stop.logits.numpy(), abs=5e-5)
    elif not LAWS[name].is_pair:
        with pytest.raises(NoPair, match="launcher/export.py with --format merged"):
            exported(stop.path, tmp_path / "plain")
    if not LAWS[name].is_pair:
        return
    plain = exported(stop.path, tmp_path / "plain")
    theirs = with_peft(tiny, plain)
    assert theirs.numpy() == pytest.approx(stop.logits.numpy(), abs=5e-5)

    uniform = exported(stop.path, tmp_path / "uniform", "--uniform_rank", "true")
    assert with_peft(tiny, uniform).numpy() == pytest.approx(theirs.numpy(), abs=1e-5)
    config = json.loads((uniform / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and config["lora_alpha"] == config["r"]


def test_dead_components_and_modules_are_left_out(stops: Any, tmp_path: Path) -> None:
    stop: Stop = stops("sora")[1]
    folder = exported(stop.path, tmp_path / "adapter")
    trained = Trained.open(stop.path)
    gates = {site.name: trained.tensor(f"{site.name}.lora_gate") for site in trained.sites}
    alive = {name: int((gate != 0).sum()) for name, gate in gates.items() if gate.any()}
    weights = load_file(folder / WEIGHTS)
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(w)
        for key, w in weights.items()
        if "lora_A" in key
    }
    assert ranks == alive
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(alive)
    assert config["rank_pattern"] == {name: r for name, r in alive.items() if r != 6}
    assert min(alive.values()) < 6, "something was pruned"
    card = (folder / "README.md").read_text()
    assert "| method | sora |" in card and str(folder) in card


def test_a_wholly_dead_adapter_is_an_error(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    options = {"method": "sora", "sora_lambdas": (1e6,), "max_steps": 3}
    told = ranks(2, "tests.work.run:train", flags=tiny.flags(tmp_path / "run", **options))
    assert "no adapter is written: no component of any adapter has a nonzero update" in told[0]
    assert "opens in peft" not in told[0] and "--init_adapter" not in told[0]
    with pytest.raises(UserError, match="no component of any adapter has a nonzero update"):
        exported(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp_*"))


def test_merged_in_bf16_says_what_rounding_kept(
    stops: Any, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop: Stop = stops("roselora")[1]
    exact = exported(stop.path, tmp_path / "exact", "--format", "merged", "--dtype", "fp32")
    capsys.readouterr()
    nearest = exported(stop.path, tmp_path / "nearest", "--format", "merged")
    told = capsys.readouterr().out
    drawn = exported(
        stop.path, tmp_path / "drawn", "--format", "merged", "--rounding", "stochastic"
    )
    base = whole_model(tiny.model, quantization="nf4").state_dict()
    wanted, near, random = (whole_weights(f) for f in (exact, nearest, drawn))
    touched = {k: wanted[k] != base[k] for k in wanted}
    kept = sum(int(((near[k] == base[k].bfloat16()) & touched[k]).sum()) for k in wanted)
    count = sum(int(t.sum()) for t in touched.values())
    assert f"{kept:,} of {count:,} weights with a nonzero update" in told
    for k, w in wanted.items():
        assert torch.equal(near[k], w.bfloat16())
        still = w == w.bfloat16().float()
        assert torch.equal(random[k][still].float(), w[still]), "what bf16 holds is not drawn"
        assert (random[k].float() - w).abs().max() <= w.abs().max() * 2**-7
    # Unbiased: the sum of many errors stays far below that of as many roundings one way.
    errors = torch.cat([(random[k].float() - wanted[k])[touched[k]] for k in wanted])
    if len(errors) > 100:
        assert errors.mean().abs() < errors.abs().mean() * 5 / len(errors) ** 0.5


def whole_weights(folder: Path) -> dict[str, Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


def test_onto_the_original_weights(
    stops: Any, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop: Stop = stops("lora")[0]
    flags = ["--format", "merged", "--dtype", "fp32"]
    over = whole_weights(exported(stop.path, tmp_path / "over", *flags))
    capsys.readouterr()
    original = whole_weights(
        exported(stop.path, tmp_path / "original", *flags, "--onto", "original")
    )
    told = capsys.readouterr().out
    base = whole_model(tiny.model, quantization="none").state_dict()
    rounded = whole_model(tiny.model, quantization="nf4").state_dict()
    apart = whole = 0.0
    for key, weight in base.items():
        delta = over[key] - rounded[key]
        torch.testing.assert_close(original[key], weight + delta, rtol=0, atol=1e-6)
        if "proj" in key:
            apart += float((weight - rounded[key]).square().sum())
            whole += float(weight.square().sum())
    assert f"differ from the original ones by {(apart / whole) ** 0.5:.1%} of their norm" in told


def test_a_sparse_delta_is_applied_and_taken_back(
    stops: Any, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop: Stop = stops("roselora")[1]
    folder = exported(stop.path, tmp_path / "delta", "--format", "sparse_delta")
    told = capsys.readouterr().out
    model = whole_model(tiny.model, quantization="nf4")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    applied = apply_sparse_delta(model, folder)
    assert logits_of(model).numpy() == pytest.approx(stop.logits.numpy(), abs=1e-4)
    changed = sum(int((t != before[k]).sum()) for k, t in model.state_dict().items())
    applied.undo()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())

    trained = Trained.open(stop.path)
    stored = sum(len(t) for k, t in whole_weights(folder).items() if k.endswith(".values"))
    weights = sum(s.in_features * s.out_features for s in trained.sites)
    bound = 1 - sum(change.max_changed for _, change in trained.changes()) / weights
    assert changed <= stored and stored / weights <= 1 - bound
    assert 0 < bound and f"{1 - stored / weights:.4%}; at least {bound:.4%}" in told

    bf16 = whole_model(tiny.model, quantization="none").bfloat16()
    original = {k: t.clone() for k, t in bf16.state_dict().items()}
    first, second = apply_sparse_delta(bf16, folder), apply_sparse_delta(bf16, folder)
    with pytest.raises(UserError, match="changed since it was applied, or it is undone already"):
        first.undo()  # the second one's sums would be taken away, and come back with its undo
    second.undo()
    first.undo()
    assert all(torch.equal(t, original[k]) for k, t in bf16.state_dict().items())
    with pytest.raises(UserError, match="changed since it was applied, or it is undone already"):
        first.undo()
    cast = apply_sparse_delta(bf16, folder)
    bf16.float()
    with pytest.raises(UserError, match="changed since it was applied"):
        cast.undo()


def test_one_rank_for_all_is_refused_for_what_has_none(stops: Any, tmp_path: Path) -> None:
    """SHiRA exports as PEFT's own type, which no server of LoRA reads."""
    stop: Stop = stops("shira")[1]
    with pytest.raises(UserError, match="--uniform_rank is of LoRA"):
        exported(stop.path, tmp_path / "out", "--uniform_rank")


@pytest.mark.parametrize("name", ["shira", "sara", "sbora"])
def test_a_delta_on_a_support_computes_the_trained_logits(
    stops: Any, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    stop: Stop = stops(name)[1]
    folder = exported(stop.path, tmp_path / "delta", "--format", "sparse_delta")
    model = whole_model(tiny.model, quantization="nf4")
    apply_sparse_delta(model, folder)
    assert logits_of(model).numpy() == pytest.approx(stop.logits.numpy(), abs=1e-4)


def test_the_bound_is_reached_where_components_lie_apart() -> None:
    a_LI, b_OL = torch.zeros(2, 10), torch.zeros(8, 2)
    a_LI[0, :2], b_OL[:3, 0] = 1.0, 2.0
    a_LI[1, 5:9], b_OL[4:5, 1] = 1.0, 2.0
    change = LowRank(a_LI=a_LI, b_OL=b_OL, scale=0.5)
    indices_N, values_N = nonzeros(change)
    assert len(indices_N) == change.max_changed == 2 * 3 + 4 * 1
    assert indices_N.tolist() == [0, 1, 10, 11, 20, 21, 45, 46, 47, 48]
    assert values_N.tolist() == [1.0] * 10
    found = Sparsity(weights=80, changed=10, max_changed=10)
    assert found.sparsity == found.bound == 1 - 10 / 80


def test_modules_trained_in_full_go_along_or_stay_apart(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = tiny.flags(tmp_path / "run", modules_to_save="lm_head")
    logits = ranks(2, LOGITS, flags=flags, input_ids_MT=TOKENS_MT)[0]
    plain = exported(tmp_path / "run", tmp_path / "plain")
    assert with_peft(tiny, plain).numpy() == pytest.approx(logits.numpy(), abs=5e-5)
    merged = exported(tmp_path / "run", tmp_path / "merged", "--format", "merged", "--dtype=fp32")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert logits_of(model).numpy() == pytest.approx(logits.numpy(), abs=1e-4)

    uniform = exported(tmp_path / "run", tmp_path / "uniform", "--uniform_rank")
    assert "lm_head trained in full" in capsys.readouterr().out
    with safe_open(str(uniform / APART), framework="pt") as file:
        assert list(file.keys()) == ["lm_head.weight"]
    assert not [key for key in load_file(uniform / WEIGHTS) if "lm_head" in key]


def test_a_classifier_is_merged_with_its_head(ranks: Ranks, tmp_path: Path) -> None:
    tiny = write_labelled(tmp_path, save_base(tmp_path / "model", "bert"))  # its head is new
    config = json.loads((tiny.model / "config.json").read_text())
    several = {"problem_type": "multi_label_classification"}  # as models of the hub have it
    (tiny.model / "config.json").write_text(json.dumps(config | several))
    flags = tiny.flags(tmp_path / "run", task="seq_cls", sequence_length=48)
    logits = ranks(2, LOGITS, flags=flags, input_ids_MT=TOKENS_MT)[0]
    folder = exported(tmp_path / "run", tmp_path / "merged", "--format", "merged", "--dtype=fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    trained = Trained.open(tmp_path / "run")
    state = model.state_dict()
    assert trained.full
    for name in trained.full:
        assert torch.equal(state[name], trained.tensor(name)), name
    assert logits_of(model).numpy() == pytest.approx(logits.numpy(), abs=1e-4)
    assert list(model.config.id2label.values()) == ["bad", "good", "ugly"]
    assert model.config.problem_type == "single_label_classification"
    labels = torch.zeros(len(logits), dtype=torch.int64)
    loss = model(input_ids=TOKENS_MT[: len(logits)], labels=labels).loss
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)


def test_in_bf16_an_export_has_the_bytes_of_the_runs_own_adapter(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    options = {"method": "adalora", "precision": "bf16", "modules_to_save": "norm", "max_steps": 8}
    ranks(2, "tests.work.run:train", flags=tiny.flags(tmp_path / "run", **options))
    folder = exported(tmp_path / "run", tmp_path / "out")
    own = tmp_path / "run" / "adapter"
    assert (folder / WEIGHTS).read_bytes() == (own / WEIGHTS).read_bytes()
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (folder, own)]
    sets = [set(config.pop("target_modules")) for config in configs]  # PEFT has them in no order
    assert configs[0] == configs[1] and sets[0] == sets[1]


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
@pytest.mark.parametrize("kind", ["peft", "merged", "sparse_delta"])
def test_the_lines_of_the_card_load_it(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, kind: str, task: str
) -> None:
    options = {"max_steps": 2, "quantization": "none"}
    flags = tiny.flags(tmp_path / "run", **options)
    if task == "seq_cls":
        labelled = write_labelled(tmp_path, save_base(tmp_path / "model", "bert"))
        flags = labelled.flags(tmp_path / "run", task=task, sequence_length=48, **options)
    logits = ranks(1, LOGITS, flags=flags, input_ids_MT=TOKENS_MT)[0]
    folder = exported(tmp_path / "run", tmp_path / "out", "--format", kind)
    card = (folder / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0].replace("applied.undo()", "")
    names: dict[str, Any] = {}
    exec(lines, names)
    if (kind, task) != ("sparse_delta", "seq_cls"):  # whose head is new, and drawn again
        assert (logits_of(names["model"]) - logits).abs().max() < 0.3, "but for bf16"
    assert ("without the trained weights of classifier" in card) == (
        (kind, task) == ("sparse_delta", "seq_cls")
    )


def test_a_card_calls_lora_what_is_one(stops: Any, tmp_path: Path) -> None:
    for name, tag in (("lora", "lora"), ("cola", "lora"), ("shira", "shira"), ("pst", "pst")):
        kind = "merged" if name == "pst" else "peft"
        card = exported(stops(name)[1].path, tmp_path / name, "--format", kind) / "README.md"
        assert f"tags: [sparse-lora-dist, {tag}]" in card.read_text()


def test_only_touched_weights_are_drawn() -> None:
    merge = Merge(dtype=torch.bfloat16, stochastic=True, onto="original")
    before = torch.randn(64, 64)
    delta = torch.zeros(64, 64)
    delta[0] = 1e-3
    rounded = merge._rounded(before, delta, torch.Generator().manual_seed(0))
    assert torch.equal(rounded[1:], before[1:].bfloat16()) and merge.touched == 64


def test_a_delta_of_another_model_changes_nothing(
    stops: Any, tiny: TinyRun, tmp_path: Path
) -> None:
    folder = exported(stops("roselora")[0].path, tmp_path / "delta", "--format", "sparse_delta")
    config = AutoConfig.from_pretrained(tiny.model)
    config.intermediate_size = 256
    model = AutoModelForCausalLM.from_config(config)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(UserError, match="the sparse delta was made for"):
        apply_sparse_delta(model, folder)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with pytest.raises(UserError, match="holds no sparse delta"):
        apply_sparse_delta(model, tmp_path)


# Bad input


@pytest.fixture(scope="module")
def run(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    ranks(1, "tests.work.run:train", flags=tiny.flags(folder, max_steps=1))
    return folder


def test_what_is_in_the_way_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        exported(run, tmp_path / "out")
    for place in (tmp_path / "out", run, run / "checkpoints", tmp_path):
        with pytest.raises(UserError, match="is not an earlier export"):
            exported(run, place, "--overwrite", "true")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    assert (run / "run.yaml").exists()
    earlier = exported(run, tmp_path / "earlier")
    (earlier / "mine").touch()
    with pytest.raises(UserError, match="holds mine, which no export has written"):
        exported(run, earlier, "--overwrite", "--uniform_rank")
    (earlier / "mine").unlink()
    exported(run, earlier, "--overwrite", "--format", "merged")
    assert (earlier / "config.json").exists() and not (earlier / WEIGHTS).exists()
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_put_in_place_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = exported(run, tmp_path / "earlier")
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp_"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(UserError, match="No space left on device"):
        exported(run, earlier, "--overwrite")
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def test_a_run_without_a_checkpoint_and_no_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        exported(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="is not a folder"):
        exported(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        exported(tmp_path, tmp_path / "out")


def test_a_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (file,) = (tmp_path / "run").glob("checkpoints/*/rank_00000.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="was altered after it was saved"):
        exported(file.parent, tmp_path / "out")


def test_a_checkpoint_named_from_inside(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (step,) = run.glob("checkpoints/step_*")
    monkeypatch.chdir(step)
    exported(Path("."), tmp_path / "out")
    assert "held-out loss" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_of_another_version(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("checkpoints/*/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(sealed(manifest | {"config": manifest["config"] | {"scale_rule": "sqrt"}}))
    with pytest.raises(
        UserError, match="scale_rule is saved with the run, but is not an option of this version"
    ):
        exported(tmp_path / "run", tmp_path / "out")
    path.write_text(sealed(manifest | {"format": 4}))
    with pytest.raises(UserError, match="Use the version that saved the checkpoint"):
        exported(tmp_path / "run", tmp_path / "out")


def test_code_that_comes_with_the_base_runs_only_if_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("checkpoints/*/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    trusts = manifest["config"] | {"trust_remote_code": True}
    path.write_text(sealed(manifest | {"config": trusts}))
    with pytest.raises(UserError, match="add --trust_remote_code"):
        exported(tmp_path / "run", tmp_path / "out", "--format", "merged")
    exported(tmp_path / "run", tmp_path / "out", "--format=merged", "--trust_remote_code")


def test_another_base(
    run: Path, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = ["--format", "merged", "--base", str(tmp_path / "base")]
    shutil.copytree(tiny.model, tmp_path / "base")
    monkeypatch.setattr(Trained, "base", "/gone/model")
    with pytest.raises(UserError, match="Give the base model's folder with --base FOLDER"):
        exported(run, tmp_path / "moved", *merged[:2])
    exported(run, tmp_path / "moved", *merged)  # the same, elsewhere
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match="is not the base model that"):
        exported(run, tmp_path / "out", *merged)


@pytest.fixture(scope="module")
def quantized(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as bitsandbytes saves it."""
    folder = tmp_path_factory.mktemp("quantized")
    flags = tiny.flags(folder / "run", base_cache=folder / "cache")
    ranks(1, "tests.work.run:train", flags=flags)
    (found,) = (p.parent for p in (folder / "cache").rglob("config.json"))
    for path in tiny.model.glob("*token*"):
        shutil.copyfile(path, found / path.name)
    return found


def test_a_base_in_4_bits(ranks: Ranks, tiny: TinyRun, quantized: Path, tmp_path: Path) -> None:
    """Refused with the way, which works."""
    flags = tiny.flags(tmp_path / "run", max_steps=2, model=quantized)
    ranks(1, "tests.work.run:train", flags=flags)
    merged = ["--format", "merged", "--dtype", "fp32"]
    with pytest.raises(UserError, match="is quantised to 4 bits.*--base FOLDER --onto original"):
        exported(tmp_path / "run", tmp_path / "out", *merged)
    merged += ["--base", str(tiny.model)]
    with pytest.raises(UserError, match="Add --onto original"):
        exported(tmp_path / "run", tmp_path / "out", *merged)
    folder = exported(tmp_path / "run", tmp_path / "out", *merged, "--onto", "original")
    weights, original = whole_weights(folder), whole_weights(tiny.model)
    scale = 32.0 / 4
    for site, (a_LI, b_OL) in Trained.open(tmp_path / "run").pairs():
        summed = original.pop(f"{site.name}.weight").float() + b_OL @ a_LI * scale
        torch.testing.assert_close(weights[f"{site.name}.weight"], summed, rtol=0, atol=1e-6)
    assert all(torch.equal(weights[k], w.float()) for k, w in original.items())


def test_what_reads_a_base_in_4_bits_is_exported(
    ranks: Ranks, tiny: TinyRun, quantized: Path, tmp_path: Path
) -> None:
    """NEAT's h is of the weights that the run had; merged, it goes onto those that they were."""
    options = {"method": "neat", "max_steps": 3, "learning_rate": 0.02}
    flags = tiny.flags(tmp_path / "run", model=quantized, **options)
    logits = ranks(2, LOGITS, flags=flags, input_ids_MT=TOKENS_MT)[0]
    adapter = exported(tmp_path / "run", tmp_path / "peft")
    assert with_peft(tiny, adapter).numpy() == pytest.approx(logits.numpy(), abs=5e-5)
    onto = ["--format", "merged", "--dtype", "fp32", "--onto", "original"]
    merged = exported(tmp_path / "run", tmp_path / "out", *onto, "--base", str(tiny.model))
    weights, original = whole_weights(merged), whole_weights(tiny.model)
    pairs = load_file(adapter / WEIGHTS)
    for key, a_RI in ((k, t) for k, t in pairs.items() if "lora_A" in k):
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        delta_OI = pairs[key.replace("lora_A", "lora_B")] @ a_RI * 8.0
        torch.testing.assert_close(weights[name] - original[name], delta_OI, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="is not the base model that"):
        exported(tmp_path / "run", tmp_path / "no", "--base", str(tiny.model))


def test_what_a_base_in_4_bits_holds_in_floats_is_not_quantised_for_an_export(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """As llm_int8_skip_modules makes them: NEAT's h was of the floats."""
    flags = tiny.flags(
        tmp_path / "a", base_cache=tmp_path / "cache", modules_to_save="v_proj", max_steps=1
    )
    ranks(1, "tests.work.run:train", flags=flags)
    (base,) = (p.parent for p in (tmp_path / "cache").rglob("config.json"))
    for path in tiny.model.glob("*token*"):
        shutil.copyfile(path, base / path.name)
    options = {"method": "neat", "max_steps": 2, "target_modules": "q_proj,v_proj"}
    ranks(1, "tests.work.run:train", flags=tiny.flags(tmp_path / "run", model=base, **options))
    found = load_file(exported(tmp_path / "run", tmp_path / "peft") / WEIGHTS)
    of_run = load_file(tmp_path / "run" / "adapter" / WEIGHTS)
    assert found.keys() == of_run.keys()
    assert all(torch.equal(found[k], of_run[k]) for k in found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "gguf"], "gguf"),
        (["--uniform_rank", "true", "--format", "merged"], "uniform_rank belongs to --format peft"),
        (["--dtype", "fp32"], "dtype belongs to --format merged"),
        (["--dtype=bf16", "--plus", " "], "dtype belongs to --format merged(.|\\n)*--plus must be"),
        (
            ["--format", "merged", "--dtype", "fp32", "--rounding", "stochastic"],
            "rounding stochastic is for --dtype bf16",
        ),
        (["--wat", "1"], "wat"),
        (["--forma", "peft"], "forma"),
        (["--overwrite", "maybe"], "maybe"),
    ],
)
def test_wrong_options(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_request(["runs/x", "--output", "out", *flags])
