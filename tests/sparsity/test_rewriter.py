"""Sites written anew: what a method is shown is what one process alone would see, on any ranks;
what it keeps lies in shares wherever they lie, and goes with the run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.rewriting import Share
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.sparsity.rewriter import over_sites
from tests.config.test_ds_configs import engine_file
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.laws import LAWS
from tests.tiers import in_full
from tests.training.test_laws import KEYS, saved
from tests.work.writing import Plainly
from tests.zero3.test_nvme import nvme_file

TRAIN = "tests.work.writing:train_writer"
SITE = "model.layers.0.self_attn.q_proj"


def words(tiny: TinyRun, folder: Path, **options: Any) -> list[str]:
    """Five steps of 12 rows."""
    usual = {"method": "writer", "micro_batch_size": 6, "max_steps": 5, "learning_rate": 1e-3}
    return tiny.flags(folder, **usual | options)


def ends(run: Path) -> dict[str, dict[str, Tensor]]:
    """All that the last checkpoint has of tensors."""
    return {key: saved(run, key, 5) for key in ("master", "exp_avg", "kept", "squares")}


def same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    for key, tensors in one.items():
        assert tensors and tensors.keys() == other[key].keys()
        assert all(torch.equal(t, other[key][name]) for name, t in tensors.items()), key


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks, in one go."""
    folder = tmp_path_factory.mktemp("straight")
    ranks(2, TRAIN, flags=words(tiny, folder))
    return folder


LAYOUTS = {
    "one rank": (1, {"micro_batch_size": 12}),
    "two ranks, accumulation and checkpointing": (
        2,
        {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "gradient_checkpointing": True},
    ),
    "three ranks": (3, {"micro_batch_size": 4}),
}


@pytest.mark.parametrize(("size", "options"), LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_shown_what_one_process_would_see(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, size: int, options: dict[str, Any]
) -> None:
    everyone = ranks(size, "tests.work.writing:shown", flags=words(tiny, tmp_path / "a", **options))
    alone = words(tiny, tmp_path / "b", method="lora", micro_batch_size=12, stop_after=1)
    (wanted,) = ranks(1, "tests.work.writing:plainly", flags=alone, site=SITE)
    assert isinstance(wanted, Plainly)
    first = everyone[0][SITE, 1]
    torch.testing.assert_close(first["squares_I"], wanted.squares_I, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(first["gradient_OI"], wanted.gradient_OI, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(first["rows_NI"], wanted.rows_NI, rtol=1e-4, atol=1e-5)
    assert first["lora_b"].dtype == torch.float32 and first["lora_b"].any()
    measured = first["measures_SK"]
    assert float(measured[0, 0]) == pytest.approx(float(first["weight"].double().norm()))
    assert measured[:, 1].tolist() == list(range(len(measured)))
    later = everyone[0][SITE, 4]
    assert int(later["toy_step"]) == 2**40 + 2 and later["toy_bits"].tolist() == [2, 3, 4, 5, 250]
    assert torch.equal(later["toy_large"], later["weight"] * 3)
    assert "gradient_OI" not in later and "rows_NI" not in later
    assert not any(everyone[1:]), "the answer is rank 0's"


def test_what_is_kept_goes_with_the_run(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, straight: Path
) -> None:
    for last in (1, 3, 5):
        ranks(2, TRAIN, flags=words(tiny, tmp_path, stop_after=last, resume="auto"))
    same(ends(straight), ends(tmp_path))
    rows = [read_records(run / "decisions.jsonl") for run in (straight, tmp_path)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 4]
    assert rows[0][0]["norm"] > 0.0


def test_modules_trained_in_full_keep_their_moments(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """SHiRA begins anew after each calibration step, the head beside it does not."""
    options = {"method": "shira", "shira_support": "snip", "shira_calibration_steps": 2}
    flags = words(tiny, tmp_path, modules_to_save="lm_head", max_steps=3, stop_after=2, **options)
    ranks(1, "tests.work.run:train", flags=flags)
    moments = saved(tmp_path, "exp_avg", 2)
    assert moments.pop("lm_head.weight").any()
    assert moments and not any(moment.any() for moment in moments.values())


@pytest.mark.usefixtures("full")
def test_kept_bytes_go_to_other_numbers_of_ranks(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, straight: Path
) -> None:
    for size, last in ((3, 2), (1, 3), (2, 5)):
        layout = {"micro_batch_size": 12 // size, "stop_after": last, "resume": "auto"}
        ranks(size, TRAIN, flags=words(tiny, tmp_path, **layout))
    one, other = ends(straight)["kept"], ends(tmp_path)["kept"]
    assert one.keys() == other.keys()
    # All but what follows from trained numbers.
    assert all(torch.equal(t, other[name]) for name, t in one.items())


HOMES = {
    "everything sharded": {"stage3_param_persistence_threshold": 0},
    "much of it whole": {"stage3_param_persistence_threshold": 10**6},
    "in host memory": {"offload_param": {"device": "cpu", "pin_memory": True}},
    "a copy per node": {"zero_hpz_partition_size": 2},
}


@pytest.mark.parametrize("home", [in_full(h) if "much" in h else h for h in HOMES])
def test_wherever_shares_lie(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, straight: Path, home: str
) -> None:
    name = "zero3_hpz" if home == "a copy per node" else "zero3"
    file = engine_file(tmp_path, name, **HOMES[home])
    ranks(2, TRAIN, flags=words(tiny, tmp_path / "run", ds_config=file))
    same(ends(straight), ends(tmp_path / "run"))


@pytest.mark.usefixtures("full")
def test_what_is_kept_is_not_rounded_where_shares_are_of_16_bits(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """Numbers of 8, 32 and 64 bits lie in shares of bf16, are gathered, saved and read again."""
    one, parts = tmp_path / "one", tmp_path / "parts"
    seen = ranks(2, "tests.work.writing:shown", flags=words(tiny, one, precision="bf16"))[0]
    for size, last in ((2, 3), (3, 4), (2, 5)):
        layout = {"micro_batch_size": 12 // size, "stop_after": last, "resume": "auto"}
        ranks(size, TRAIN, flags=words(tiny, parts, precision="bf16", **layout))
    large_OI = seen[SITE, 4]["weight"] * 5
    assert not torch.equal(large_OI, large_OI.bfloat16().float())
    for kept in (saved(one, "kept", 5), saved(parts, "kept", 5)):
        assert torch.equal(kept[f"{SITE}.toy_large"].view(torch.float32), large_OI.flatten())
        assert kept[f"{SITE}.toy_step"].view(torch.int64).tolist() == [2**40 + 4]
        assert kept[f"{SITE}.toy_bits"].tolist() == [2, 3, 4, 5, 250]


@pytest.mark.parametrize("name", ["cola", in_full("sara"), in_full("prilora")])
def test_under_bf16_what_is_written_and_kept_resumes_bit_for_bit(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    usual = {"method": name, "precision": "bf16", "max_steps": 12, "save_every": 8, "rank": 6}
    flags = tiny.flags(tmp_path, **usual | LAWS[name].on, micro_batch_size=3)
    ranks(2, "tests.work.run:train", flags=flags)
    # Floats, places, squares of inputs; bits are as the bytes above.
    straight = {key: saved(tmp_path, key, 12) for key in KEYS}
    assert straight["kept"] or straight["squares"]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000012")
    ranks(2, "tests.work.run:train", flags=[*flags, "--resume", "auto"])
    for key, tensors in straight.items():
        resumed = saved(tmp_path, key, 12)
        assert tensors.keys() == resumed.keys()
        assert all(torch.equal(t, resumed[n]) for n, t in tensors.items()), key


@pytest.mark.timeout(1800)
def test_beside_a_base_on_disk(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, straight: Path, async_io: None
) -> None:
    file = nvme_file(tmp_path)
    ranks(2, TRAIN, flags=words(tiny, tmp_path / "run", ds_config=file))
    # To rounding: a disk's shares are gathered a module at a time, others a layer (decision 112).
    one, other = ends(straight), ends(tmp_path / "run")
    for key, tensors in one.items():
        assert tensors and tensors.keys() == other[key].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, other[key][name], rtol=1e-3, atol=1e-5)


def test_a_gradient_that_is_not_finite_chooses_nothing(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = words(tiny, tmp_path, method="shira", shira_support="snip", eval_data="null")
    told = ranks(1, "tests.work.writing:refusal_of_infinite", flags=flags)
    assert "--method shira selects weights by the gradients or inputs of step 1" in told[0]


def test_a_share_is_of_the_entries_of_all_sites_and_other_numbers_are_means() -> None:
    assert over_sites([Share(4, 4), Share(0, 12)]) == 0.25
    assert over_sites([4.0, 0.0]) == 2.0
