"""The cache of the 4-bit base: what is written once is what any number of ranks loads, and nothing
else is ever loaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_lora_dist.base_model.cache import content
from sparse_lora_dist.base_model.cache.content import who_else_can_write
from sparse_lora_dist.base_model.cache.folder import PREFIX, remove_left_overs
from sparse_lora_dist.base_model.cache.lookup import ABOUT
from sparse_lora_dist.base_model.safetensors_writer import SafetensorsWriter
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.errors import ConfigError
from tests.conftest import Ranks
from tests.fixtures.tiny_models import save_family, save_llama
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import in_full
from tests.training.test_runs import exact, rows_of
from tests.work.cache import fuse_experts

LOAD = "tests.work.cache:load"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def only_cache(directory: Path) -> Path:
    """The one cache there is, and nothing beside it."""
    (folder,) = directory.iterdir()
    return folder


def assert_same_base(found: dict[str, Any], first: dict[str, Any]) -> None:
    assert len(first["bytes"]) >= 8
    assert found["bytes"] == first["bytes"]
    assert torch.equal(found["logits"], first["logits"])
    assert found["identity"] == first["identity"]


# What is written is what is loaded.

MODELS: dict[str, Callable[[Path], Path]] = {
    "tied": lambda to: save_llama(to, tied=True),
    "several fp32 files": lambda to: save_llama(to, dtype=torch.float32, max_shard_size="40KB"),
    "qwen2": lambda to: save_family(to, "qwen2"),  # biases
    "gpt_neox": lambda to: save_family(to, "gpt_neox"),
    "mixtral": lambda to: save_family(to, "mixtral"),
    "fused mixtral": lambda to: fuse_experts(save_family(to.parent / "whole", "mixtral"), to),
}
EVERYDAY = {("qwen2", False), ("mixtral", True)}
"""Kinds and kinds of scales that ``make test`` tries."""


@pytest.mark.parametrize(
    ("kind", "double_quant"),
    [row if row in EVERYDAY else in_full(*row) for row in product(MODELS, (True, False))],
)
def test_written_on_2_ranks_and_loaded_on_1_to_4(
    ranks: Ranks, tmp_path: Path, kind: str, double_quant: bool
) -> None:
    arguments = {
        "folder": str(MODELS[kind](tmp_path / "model")),
        "cache": str(tmp_path / "cache"),
        "double_quant": double_quant,
    }
    first = ranks(2, LOAD, **arguments)
    assert not any(rank["cached"] for rank in first)
    for size in (1, 2, 3, 4) if double_quant else (3,):
        for rank in ranks(size, LOAD, **arguments):
            assert rank["cached"]
            assert_same_base(rank, first[0])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if "mixtral" not in kind])
def test_it_is_a_checkpoint_for_transformers_with_bitsandbytes(
    ranks: Ranks, tmp_path: Path, kind: str, double_quant: bool
) -> None:
    folder, cache = MODELS[kind](tmp_path / "model"), tmp_path / "cache"
    (first,) = ranks(1, LOAD, folder=str(folder), cache=str(cache), double_quant=double_quant)
    made = only_cache(cache)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is double_quant
    # As --model it loads on two ranks, and its logits are those of transformers.
    for rank in ranks(2, "tests.work.kinds:packed_like_the_files", folder=str(made)):
        assert rank["linears"] == len(first["bytes"])
        assert rank["equal"]
        assert torch.equal(rank["logits"], first["logits"])


def test_written_while_shards_lie_in_host_memory(ranks: Ranks, tmp_path: Path, llama: Path) -> None:
    arguments = {"folder": str(llama), "cache": str(tmp_path)}
    offload = {"offload_param": {"device": "cpu"}}
    first = ranks(2, LOAD, **arguments, zero=offload)[0]
    for rank in ranks(3, LOAD, **arguments):
        assert rank["cached"]
        assert_same_base(rank, first)


def test_in_several_files(ranks: Ranks, tmp_path: Path, llama: Path) -> None:
    arguments = {"folder": str(llama), "cache": str(tmp_path), "file_bytes": 10_000}
    first = ranks(2, "tests.work.cache:load_in_small_files", **arguments)[0]
    files = sorted(f.name for f in only_cache(tmp_path).glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for rank in ranks(3, LOAD, folder=str(llama), cache=str(tmp_path)):
        assert rank["cached"]
        assert_same_base(rank, first)


def test_a_run_resumes_from_the_cache_and_without_it(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    train, cache = "tests.work.run:train", {"base_cache": tmp_path / "cache"}
    ranks(2, train, flags=tiny.flags(tmp_path / "whole"))
    whole = exact([row for row in rows_of(tmp_path / "whole") if "loss" in row])
    ways = {"begun without": [{}, cache, cache], "begun with": [cache, cache, {}]}
    for name, (first, second, third) in ways.items():
        folder = tmp_path / name
        for stop, way in ((1, first), (2, second), (4, third)):
            flags = tiny.flags(folder, stop_after=stop, resume="auto", **way)
            said, _ = ranks(2, train, flags=flags)
            assert "base_cache" not in said, "it changes nothing, so it is no change to tell"
        steps = [row for row in rows_of(folder) if "loss" in row]
        for mine, theirs in zip(exact(steps), whole, strict=True):
            assert {k: mine[k] for k in theirs} == theirs, name
    assert "is read from" in ranks(2, train, flags=tiny.flags(tmp_path / "last", **cache))[0]


# Nothing else is ever loaded.


def another_revision(folder: Path) -> None:
    """The last row of one tensor differs, and of each tensor the last bytes are sampled."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def another_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (another_revision, {}, "it differs in weights"),
        in_full(another_config, {}, "it differs in config.json or shapes"),
        (None, {"double_quant": False}, "it differs in double_quant"),
        in_full(None, {"modules_to_save": ("up_proj",)}, "it differs in unquantised modules"),
    ],
    ids=["revision", "config", "double_quant", "full"],
)
def test_a_cache_of_something_else_is_not_used_and_named(
    ranks: Ranks,
    tmp_path: Path,
    llama: Path,
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
    said: str,
) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(llama, model)
    ranks(2, LOAD, folder=str(model), cache=str(cache))
    old = only_cache(cache)
    if change:
        change(model)
    uncached = ranks(2, LOAD, folder=str(model), cache=None, **options)
    found = ranks(2, LOAD, folder=str(model), cache=str(cache), **options)
    assert f"{old} is not used: {said}\n" in found[0]["said"]
    for rank in found:
        assert not rank["cached"]
        assert rank["bytes"] == uncached[0]["bytes"]
        assert torch.equal(rank["logits"], uncached[0]["logits"])
    assert len(list(cache.iterdir())) == 2
    again = ranks(2, LOAD, folder=str(model), cache=str(cache), **options)
    assert all(rank["cached"] for rank in again)
    assert torch.equal(again[0]["logits"], uncached[0]["logits"])


def test_files_of_another_date_are_told(ranks: Ranks, tmp_path: Path, llama: Path) -> None:
    model, cache = tmp_path / "model", str(tmp_path / "cache")
    shutil.copytree(llama, model)
    ranks(1, LOAD, folder=str(model), cache=cache)
    (usual,) = ranks(1, LOAD, folder=str(model), cache=cache)
    os.utime(model / "model.safetensors", (1, 1))
    (touched,) = ranks(1, LOAD, folder=str(model), cache=cache)
    assert usual["cached"] and touched["cached"]
    assert "other dates" in touched["said"] and "other dates" not in usual["said"]


def cut_short(cache: Path) -> None:
    file = next(cache.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def without_index(cache: Path) -> None:
    (cache / "model.safetensors.index.json").unlink()


def without_description(cache: Path) -> None:
    (cache / ABOUT).unlink()


def with_a_broken_state(cache: Path) -> None:
    file = next(cache.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b'"blocksize"', b'blocksize""'))


def with_a_state_without_shape(cache: Path) -> None:
    file = next(cache.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b'"shape"', b'"shaqe"'))


def with_a_list_for_description(cache: Path) -> None:
    (cache / ABOUT).write_text("[]")


def with_another_code(cache: Path) -> None:
    """All is there and can be parsed, but the first code is another one."""
    file = min(cache.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    name = next(n for n in header if n.endswith(".quant_map"))
    start = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
    raw[start : start + 64] = bytes(64)
    file.write_bytes(raw)


def with_flipped_weights(cache: Path) -> None:
    """The packed bytes of one weight: no header, size or scale differs."""
    file = min(cache.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start, stop = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    base = 8 + int.from_bytes(raw[:8], "little")
    raw[base + start : base + stop] = bytes(b ^ 0x5A for b in raw[base + start : base + stop])
    file.write_bytes(raw)


def with_a_file_of_somebody_else(cache: Path) -> None:
    """transformers and this project would read it in place of the index."""
    save_file({}, cache / "model.safetensors")


DAMAGES = [
    cut_short,
    with_flipped_weights,
    in_full(with_a_file_of_somebody_else),
    without_index,
    without_description,
    *map(in_full, (with_a_list_for_description, with_a_broken_state, with_a_state_without_shape)),
    with_another_code,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_not_used_but_replaced(
    ranks: Ranks, tmp_path: Path, llama: Path, damage: Callable[[Path], None]
) -> None:
    arguments = {"folder": str(llama), "cache": str(tmp_path)}
    first = ranks(2, LOAD, **arguments)[0]
    damage(only_cache(tmp_path))
    found = ranks(2, LOAD, **arguments)
    assert not any(rank["cached"] for rank in found)
    assert "damaged and not used, and will be replaced" in found[0]["said"]
    only_cache(tmp_path)
    for rank in ranks(2, LOAD, **arguments):
        assert rank["cached"]
        assert_same_base(rank, first)


@pytest.mark.parametrize("what", ["notes.txt", "a file in its place", "a link"])
def test_a_damaged_cache_is_not_replaced_with_the_files_of_others(
    ranks: Ranks, tmp_path: Path, llama: Path, what: str
) -> None:
    arguments = {"folder": str(llama), "cache": str(tmp_path)}
    ranks(1, LOAD, **arguments)
    cache = only_cache(tmp_path)
    if what == "notes.txt":
        (cache / what).write_text("mine")
        (cache / "config.json").write_text("damaged")
    elif what == "a link":  # as to another disk
        (tmp_path / "disk").mkdir()
        (other := cache.rename(tmp_path / "disk" / "cache")).joinpath("config.json").write_text("")
        cache.symlink_to(other)
        (found,) = ranks(1, LOAD, **arguments)
        assert not found["cached"] and "it is a link" in found["said"] and cache.is_symlink()
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([cache.name, "disk"])
        return
    else:
        shutil.rmtree(cache)
        cache.write_text("mine")
    (found,) = ranks(1, LOAD, **arguments)
    assert not found["cached"] and "was not written by this program" in found["said"]
    mine = cache / what if what == "notes.txt" else cache
    assert mine.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == [cache.name]


def test_a_cache_of_before_has_no_hashes_and_is_used(
    ranks: Ranks, tmp_path: Path, llama: Path
) -> None:
    arguments = {"folder": str(llama), "cache": str(tmp_path)}
    ranks(1, LOAD, **arguments)
    made = only_cache(tmp_path)
    about = json.loads((made / ABOUT).read_text())
    del about["sha256"]
    (made / ABOUT).write_text(json.dumps(about))
    made.chmod(0o777)
    (found,) = ranks(1, LOAD, **arguments)
    assert found["cached"]
    assert "stored no hashes of its bytes" in found["said"]
    assert f"warning   {made} has mode 777: everyone can change the weights" in found["said"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_whose_a_cache_is_is_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "model-00001-of-00001.safetensors"
    file.touch()
    file.chmod(0o644)
    tmp_path.chmod(0o755)
    assert who_else_can_write(tmp_path) is None
    os.chown(file, 12345, 0)
    assert who_else_can_write(tmp_path) == f"{file} belongs to user 12345, who"


@pytest.mark.parametrize("shares", [1, 3])
def test_every_byte_of_a_cache_is_hashed_in_one_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: int
) -> None:
    monkeypatch.setattr(content, "BLOCK_BYTES", 10)
    for name, size in (("a", 25), ("b", 10), ("c", 0)):
        (tmp_path / name).write_bytes(bytes(size))
    hashes = content.hashes_of(tmp_path)
    assert [len(hashes[name]) for name in "abc"] == [3, 1, 0]

    def damages() -> list[str]:
        found = (content.find_damage(tmp_path, hashes, i, shares) for i in range(shares))
        return [text for text in found if text]

    assert damages() == []
    for place in range(25):
        raw = bytearray(25)
        raw[place] = 1
        (tmp_path / "a").write_bytes(raw)
        assert len(damages()) == 1 and "a was altered" in damages()[0]
    (tmp_path / "a").write_bytes(bytes(20))
    assert all("another size" in text for text in damages()) and damages()


def test_a_job_killed_while_it_writes_leaves_nothing_that_is_used(
    ranks: Ranks, tmp_path: Path, llama: Path
) -> None:
    command = [sys.executable, "-m", "tests.work.cache", str(llama), str(tmp_path)]
    killed = subprocess.run(
        command, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    assert killed.returncode == -9, killed.stderr.decode()
    half = only_cache(tmp_path)
    assert half.name.startswith(PREFIX)
    (file,) = half.iterdir()
    assert file.stat().st_size > 10_000
    with pytest.raises(SafetensorError):
        load_file(file)
    found = ranks(2, LOAD, folder=str(llama), cache=str(tmp_path))
    assert not any(rank["cached"] for rank in found)
    assert not only_cache(tmp_path).name.startswith(PREFIX), "what it left is removed"
    for rank in ranks(2, LOAD, folder=str(llama), cache=str(tmp_path)):
        assert rank["cached"]
        assert_same_base(rank, found[0])


@pytest.mark.usefixtures("processes")
def test_only_what_is_surely_left_over_is_removed(tmp_path: Path) -> None:
    host, dead = os.uname().nodename, subprocess.Popen(["true"])
    dead.wait()
    names = {
        f"{PREFIX}{host}-{os.getpid()}-aa": True,
        f"{PREFIX}{host}-{dead.pid}-aa": False,
        f"{PREFIX}{host}-{dead.pid}-own": True,
        f"{PREFIX}other-host-{dead.pid}-aa": True,
        f"{PREFIX}other-host-{dead.pid}-old": False,
        f"{PREFIX}not-ours": True,
        "model-0123456789abcdef": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    os.utime(tmp_path / f"{PREFIX}other-host-{dead.pid}-old", (1, 1))
    remove_left_overs(tmp_path, but=tmp_path / f"{PREFIX}{host}-{dead.pid}-own")
    assert {p.name for p in tmp_path.iterdir()} == {n for n, stays in names.items() if stays}


def test_two_jobs_that_write_the_same(ranks: Ranks, tmp_path: Path, llama: Path) -> None:
    ranks(2, LOAD, folder=str(llama), cache=str(tmp_path / "theirs"))
    theirs, ours = only_cache(tmp_path / "theirs"), tmp_path / "ours"
    ranks(
        2,
        "tests.work.cache:load_while_another_publishes",
        folder=str(llama),
        cache=str(ours),
        other=str(theirs),
    )
    assert only_cache(ours).name == theirs.name
    assert all(rank["cached"] for rank in ranks(2, LOAD, folder=str(llama), cache=str(ours)))


# Nodes, and disks that are full.

NODES = "tests.work.cache:load_on_nodes"


def test_nodes_that_share_a_disk_write_once(ranks: Ranks, tmp_path: Path, llama: Path) -> None:
    arguments = {"folder": str(llama), "caches": [str(tmp_path)] * 3}
    assert sum(rank["begun"] for rank in ranks(3, NODES, **arguments)) == 1
    only_cache(tmp_path)
    assert all(rank["cached"] for rank in ranks(3, NODES, **arguments))


def test_nodes_of_their_own_disks_write_each_what_it_lacks(
    ranks: Ranks, tmp_path: Path, llama: Path
) -> None:
    caches = [tmp_path / name for name in "abc"]
    arguments = {"folder": str(llama), "caches": [str(cache) for cache in caches]}
    first = ranks(3, NODES, **arguments)
    assert [rank["begun"] for rank in first] == [True] * 3
    contents = [{f.name: f.read_bytes() for f in only_cache(c).iterdir()} for c in caches]
    assert contents[0] == contents[1] == contents[2]
    assert all(rank["cached"] for rank in ranks(3, NODES, **arguments))
    shutil.rmtree(only_cache(caches[1]))
    lacking = ranks(3, NODES, **arguments)
    assert not any(rank["cached"] for rank in lacking), "all go the same way"
    assert [rank["begun"] for rank in lacking] == [False, True, False]
    for rank in ranks(3, NODES, **arguments):
        assert rank["cached"]
        assert_same_base(rank, first[0])


@pytest.mark.parametrize("how", ["free", "write", "sync"])
def test_a_full_disk_is_a_warning_and_training_goes_on(
    ranks: Ranks, tmp_path: Path, llama: Path, how: str
) -> None:
    full, roomy = tmp_path / "full", tmp_path / "roomy"
    found = ranks(
        2,
        "tests.work.cache:load_on_a_full_disk",
        folder=str(llama),
        caches=[str(full), str(roomy)],
        how=how,
    )
    needed = "MB are needed" if how == "free" else "No space left on device"
    said = next(line for line in found[0]["said"].splitlines() if line.startswith("warning"))
    assert "training goes on" in said and needed in said
    assert "was written to" not in found[0]["said"]
    assert not list(full.iterdir()), "nothing half written stays"
    (one,) = ranks(1, LOAD, folder=str(llama), cache=str(roomy))
    assert one["cached"], "the other node's is whole"
    for rank in found:
        assert_same_base(rank, one)


# Mistakes.


def test_bad_options(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--base_cache", "somewhere", "--quantization", "none", "--rank", "0"])
    assert len(caught.value.problems) == 2
    assert any("base_cache" in problem for problem in caught.value.problems)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/cache")):
        flags = tiny.flags(tmp_path / "run", base_cache=place)
        for message in ranks(2, "tests.work.run:refusal_before_data", flags=flags):
            assert f"--base_cache {place} is not a writable folder" in message


def test_a_model_in_4_bits_needs_none(ranks: Ranks, tmp_path: Path, llama: Path) -> None:
    (first,) = ranks(1, LOAD, folder=str(llama), cache=str(tmp_path / "one"))
    made = str(only_cache(tmp_path / "one"))
    (found,) = ranks(1, LOAD, folder=made, cache=str(tmp_path / "two"))
    assert "--base_cache is not needed" in found["said"]
    assert not (tmp_path / "two").exists()
    assert found["bytes"] == first["bytes"]


def test_files_end_when_they_or_their_header_are_full(tmp_path: Path) -> None:
    tensors = {f"a tensor of number {i}": torch.arange(i + 1) * 1.5 for i in range(20)}
    writer = SafetensorsWriter(tmp_path, header_bytes=800)
    for name, tensor in tensors.items():
        writer.add(name, "F32", tensor.shape, tensor.split(3))
    assert not list(tmp_path.glob("*.safetensors")), "no file has its name before all are written"
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
