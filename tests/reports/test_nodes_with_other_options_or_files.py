"""A command that is typed on every node, where one node is given something else: refused, with the
names of what differs, before anything is read."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lora_dist.adapter.same_on_all_nodes import Opened, fingerprint
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.data.fingerprint import hash_of_examples
from sparse_lora_dist.runtime.same_command import Given, differences, given
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.work.edit import made

SAID = "tests.work.nodes:said"
FLAT = Config().as_flat_dict()


def differing(*nodes: dict[str, object], hosts: Sequence[str] = ("n0", "n1", "n2")) -> list[str]:
    """What is said of ranks with these options, one a host."""
    everyone = [given(FLAT | options) for options in nodes]
    return differences(list(zip(hosts, everyone, strict=False)))


def test_the_same_command_passes() -> None:
    assert differing({}, {}, {}) == []


def test_each_option_that_differs_is_named_with_both_values_and_ranks() -> None:
    said = differing({}, {}, {"learning_rate": 3e-2, "seed": 5, "max_steps": 7})
    assert said == [
        "--max_steps: null on rank 0 (n0), 7 on rank 2 (n2)",
        "--learning_rate: 0.0002 on rank 0 (n0), 0.03 on rank 2 (n2)",
        "--seed: 0 on rank 0 (n0), 5 on rank 2 (n2)",
    ]


@pytest.mark.parametrize("name", sorted(FLAT.keys() - {"ds_config"}))
def test_no_option_of_training_is_passed_over(name: str) -> None:
    other = {name: "x/y" if FLAT[name] is None or isinstance(FLAT[name], str) else [FLAT[name]]}
    said = differing({}, other)
    free = name in ("debug", "device", "trackers", "time_limit", "signal_lead")
    path_in_both = name == "output_dir"  # whether it is one folder is found when it is locked
    assert bool(said) != (free or path_in_both)


def test_the_content_of_ds_config_is_compared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "b.json").write_text('{"zero_optimization": {"stage": 3, "overlap_comm": true}}')
    (tmp_path / "c.json").write_text('{ "zero_optimization":  {"stage": 3}}')
    ours, theirs, same = ({"ds_config": str(tmp_path / f"{name}.json")} for name in "abc")
    (said,) = differing(ours, theirs)
    assert said.startswith(f"--ds_config: {tmp_path}/a.json with the content ")
    assert f", {tmp_path}/b.json with the content " in said
    assert differing(ours, same, hosts=("n0", "n0")) == []


def test_each_node_may_have_its_own_nvme_disk(tmp_path: Path) -> None:
    for disk in ("a", "b"):
        engine = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": disk}}}
        (tmp_path / f"{disk}.json").write_text(json.dumps(engine))
    a, b = ({"ds_config": str(tmp_path / f"{disk}.json")} for disk in "ab")
    assert differing(a, b) == []


def test_a_disk_may_have_another_name_on_each_node() -> None:
    ours, theirs = ({"data": f"/{disk}/d.jsonl", "base_cache": f"/{disk}"} for disk in "ab")
    assert differing(ours, theirs) == []
    assert differing(ours, theirs | {"base_cache": None}) == [
        "--base_cache: /a on rank 0 (n0), null on rank 1 (n1)"
    ]
    assert differing({"data": "some/set"}, {"data": "some/other"}) == [
        "--data: some/set on rank 0 (n0), some/other on rank 1 (n1)"
    ]


def test_a_checkpoint_has_one_name_on_all_nodes() -> None:
    assert differing({"resume": "/a/step_1"}, {"resume": "/b/step_1"}) != []
    assert differing({"resume": "auto"}, {"resume": "/b/step_1"}) != []


def test_ranks_of_one_machine_that_start_in_other_folders_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks: list[tuple[str, dict[str, Given]]] = []
    for host, folder in (("n0", "a"), ("n1", "b"), ("n1", "c")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m").mkdir()
        monkeypatch.chdir(tmp_path / folder)
        ranks.append((host, given(FLAT | {"model": "m", "data": "d.jsonl", "output_dir": "/o"})))
    assert differences(ranks[:2]) == []
    assert differences(ranks) == [
        f"--{name}: {tmp_path}/b/{file} on rank 1 (n1), {tmp_path}/c/{file} on rank 2 (n1)"
        for name, file in (("model", "m"), ("data", "d.jsonl"))
    ]


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    ours, theirs = ({"data": f"{tmp_path}/{name}/d.jsonl"} for name in "ab")
    assert differing(ours, theirs, hosts=("n0", "n0")) == []


def test_another_method_is_named_and_not_its_options() -> None:
    ours, theirs = {"method": "lora"}, {"method": "sora", "sora_lambda": 1.0}
    assert differing(ours, theirs) == ["--method: lora on rank 0 (n0), sora on rank 1 (n1)"]
    assert differing(theirs, ours) == ["--method: sora on rank 0 (n0), lora on rank 1 (n1)"]


def test_rows_of_an_evaluation_have_a_hash_that_every_process_finds() -> None:
    rows: list[dict[str, Any]] = [{"a": "x", "b": object()}, {"a": None}]
    again: list[dict[str, Any]] = [{"b": object(), "a": "x"}, {"a": None}]
    assert hash_of_examples(rows) == hash_of_examples(again)
    assert hash_of_examples(rows) != hash_of_examples(rows[::-1])


def test_adapters_are_told_apart_by_each_part() -> None:
    def adapter(*, last: float = 0.0, scale: float = 2.0, shape: tuple[int, int] = (4, 300)) -> str:
        entries = torch.zeros(shape).flatten()
        entries[-1] = last
        return fingerprint(
            Opened(
                name="",
                values={"q.lora_a": lambda start, stop: entries[start:stop]},
                shapes={"q.lora_a": shape},
                scales={"q": scale},
            )
        )

    assert adapter() == adapter()
    assert len({adapter(), adapter(last=1), adapter(scale=1), adapter(shape=(2, 600))}) == 4


def test_options_that_differ_between_nodes_end_a_run_of_two_ranks(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    def flags(**more: object) -> list[str]:
        return tiny.flags(tmp_path / "run", **more)

    other = flags(learning_rate=3e-2, rank=8, micro_batch_size=1, max_steps=3, quantization="none")
    for said in ranks(2, SAID, program="train", flags=[flags(), other]):
        assert "Not all ranks were started with the same options" in said
        assert "--learning_rate: 0.01 on rank 0 (n0), 0.03 on rank 1 (n1)\n" in said
        for name in ("rank", "micro_batch_size", "max_steps", "quantization"):
            assert f"--{name}: " in said
        assert "Give all nodes the same command" in said
    assert not (tmp_path / "run").exists()


def test_the_option_of_an_evaluation_on_one_node_only_is_refused(
    ranks: Ranks, tiny: TinyRun
) -> None:
    flags = ["--model", str(tiny.model), "--eval_data", str(tiny.held_out)]
    other = [*flags, "--limit", "4", "--batch_size", "2"]
    for said in ranks(2, SAID, program="evaluate", flags=[flags, other]):
        assert "--limit: null on rank 0 (n0), 4 on rank 1 (n1)" in said
        assert "--batch_size: 8 on rank 0 (n0), 2 on rank 1 (n1)" in said


def test_questions_of_an_evaluation_are_compared_between_nodes(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    rows = tiny.held_out.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[::-1]))
    flags = [
        ["--model", str(tiny.model), "--precision", "fp32", "--eval_data", str(path)]
        for path in (tiny.held_out, tmp_path / "other.jsonl")
    ]
    for said in ranks(2, SAID, program="evaluate", flags=flags):
        assert "Not all nodes have the same data: rank 1 and rank 0 differ in" in said
        assert "--eval_data" in said
    assert ranks(2, SAID, program="evaluate", flags=flags[:1] * 2) == ["", ""]
    templates = []
    for mark in "AB":
        (tmp_path / mark).write_text(
            f"{{% for m in messages %}}{mark}{{{{ m.content }}}}{{% endfor %}}"
        )
        more = ["--chat_template", str(tmp_path / mark), "--train_on", "all"]
        templates.append([*flags[0], *more])
    for said in ranks(2, SAID, program="evaluate", flags=templates):
        assert "rank 1 and rank 0 differ in the chat template" in said


def adapters(model: Path, folder: Path) -> list[Path]:
    """Two adapters that differ in their weights."""
    import peft

    from tests.fixtures.reference import whole_model

    paths = [folder / "adapter_0", folder / "adapter_1"]
    for seed, path in enumerate(paths):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"])
            whole = whole_model(model, quantization="none")
            peft.get_peft_model(whole, settings).save_pretrained(path)
    return paths


def test_weights_of_adapters_are_compared_between_nodes(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    paths = adapters(tiny.model, tmp_path)
    usual = ["--model", str(tiny.model), "--precision", "fp32", "--eval_data", str(tiny.held_out)]
    evaluation = [[*usual, "--compare", f"base,{path}"] for path in paths]
    for said in ranks(2, SAID, program="evaluate", flags=evaluation):
        assert f"Not all nodes have the same files of the adapter {tmp_path}/adapter_" in said
    assert ranks(2, SAID, program="evaluate", flags=evaluation[1:] * 2) == ["", ""]
    begins = {"target_modules": "q_proj", "precision": "fp32", "alpha": 32}
    run = [tiny.flags(tmp_path / "run", init_adapter=path, **begins) for path in paths]
    for said in ranks(2, SAID, program="train", flags=run):
        assert f"Not all nodes have the same files of --init_adapter {tmp_path}/adapter_" in said
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_edits_are_compared_between_nodes(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    flags = []
    for name, target in (("a", "Rex"), ("b", "New York City")):
        (tmp_path / f"{name}.json").write_text(json.dumps([made("Ada", "dog", target)]))
        flags.append(
            [
                *("--model", str(tiny.model), "--precision", "fp32", "--sequence_length", "64"),
                *("--edits", str(tmp_path / f"{name}.json"), "--output_dir", str(tmp_path / "run")),
            ]
        )
    for said in ranks(2, SAID, program="edit", flags=flags):
        assert "content of --edits: 1 edit with the hash" in said
        assert "--data" not in said and "--gradient" not in said
    assert not (tmp_path / "run").exists()


def test_ranks_of_one_machine_in_other_folders_end_before_the_base_is_read(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "m").symlink_to(tiny.model)
        (folder / "d.jsonl").write_bytes(tiny.data.read_bytes())
    run = replace(tiny, model=Path("m"), data=Path("d.jsonl"))
    flags = [run.flags(tmp_path / "run")] * 2
    for said in ranks(2, SAID, program="train", flags=flags, nodes=False, folders=folders):
        assert f"--data: {tmp_path}/a/d.jsonl on rank 0" in said
        assert f"{tmp_path}/b/d.jsonl on rank 1" in said
        assert "start all ranks of a machine in the same folder" in said
        assert "--model" not in said  # two links to one folder


def test_the_default_run_has_only_names_that_are_compared() -> None:
    assert given(FLAT)["ds_config"].shown.startswith(f"{RunConfig().ds_config} with the content ")
