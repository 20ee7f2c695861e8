"""Hostile or unlucky files of options: --config, a sweep's file, --ds_config."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparse_lora_dist.config import paths
from sparse_lora_dist.config.deepspeed_file import check_engine_file, engine_dict
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sweep import load_grid
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.system import small_files
from sparse_lora_dist.system.shipped import CONFIG
from tests.reports.test_values_of_options import BOMB

REPOSITORY = Path(__file__).parents[2]
GOOD = '{"zero_optimization": {"stage": 3}}'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero3.json").write_text(GOOD)
    for path in paths.EMBEDDED.values():
        (tmp_path / "assets" / path).mkdir(parents=True)
    monkeypatch.setattr(paths, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(text: str | bytes) -> str:
    """What load_config says of a --config file with this text: one problem, in short."""
    Path("o.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", "o.yaml"])
    assert time.monotonic() - started < 20
    (problem,) = caught.value.problems
    assert len(problem) < 700
    return problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "the alias *a stands for no single value. Write it out"),
        ("a: &a [*a]\n", "the alias *a stands for no single value"),
        ("rank: !!int abc\n", "cannot be read as YAML: ValueError"),
        ("rank: !!timestamp abc\n", "cannot be read as YAML"),
        ("rank: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("rank: " + "[" * 600 + "\n", "cannot be read as YAML: RecursionError: it is nested"),
        (b"\xff\xfe\x00", "cannot be read as YAML: UnicodeDecodeError"),
        ("? [a, b]\n: 1\n", "line 1 must begin with a name"),
        ("- &a x\n- *a\n", "holds a list"),
        ("".join(f"a{n}: 1\n" for n in range(1500)), "holds 1500 names, but at most 1000"),
        ("#" * (2**20 + 1), "larger than 1048576 bytes"),
    ],
)
def test_a_yaml_file_that_cannot_be_read_is_refused_in_one_sentence(
    text: str | bytes, said: str
) -> None:
    assert said in refusal(text)


def test_an_alias_of_one_value_is_read() -> None:
    Path("o.yaml").write_text("rank: &r 8\nalpha: *r\n")
    assert load_config(["--config", "o.yaml"]).adapter.alpha == 8.0


def test_a_file_of_many_unknown_names_is_refused_at_once() -> None:
    Path("o.yaml").write_text("".join(f"name_{n}: 1\n" for n in range(900)))
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", "o.yaml"])
    assert "900 problems" in str(caught.value) and "and 850 more" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["", "~nosuchuser/o.yaml", "x" * 300, "a\0b", ".", "/dev/zero", "/dev/null/x"]
)
def test_what_is_no_yaml_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", path])
    assert "--config" in caught.value.problems[0] and len(caught.value.problems[0]) < 500


def test_the_home_is_known_to_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    Path("o.yaml").write_text("rank: 3\n")
    assert load_config(["--config", "~/o.yaml"]).adapter.rank == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a":' * 3000, "it is nested too deep"),
        ('{"zero_optimization": ' + "[" * 90_000, "it is nested too deep"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "x.json is not valid JSON: "),
        ('{"steps_per_print": ' + "9" * 400 + "}", "must be a whole number from 0 up"),
        ('{"gradient_clipping": ' + "9" * 400 + "}", "must be a number from 0 up"),
        ("[" + "1, " * 5000 + "1]", "must hold one {...} object"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": '
            '{"device": "nvme", "nvme_path": "/tmp/a\\u0000b"}}}',
            "nvme_path must be a path in UTF-8 without NUL",
        ),
        (json.dumps({f"k{n}": 1 for n in range(20_000)}), "x.json has further wrong keys"),
        (b"\xff\xfe", "--ds_config x.json cannot be read"),
    ],
    ids=["deep", "deeper", "5000", "400", "float", "list", "nul", "keys", "utf-8"],
)
def test_an_engine_file_that_cannot_be_read_is_refused(text: str | bytes, said: str) -> None:
    Path("x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(["--ds_config", "x.json"])
    assert said in str(caught.value)
    assert max(map(len, caught.value.problems)) < 500 and len(str(caught.value)) < 10_000


def test_an_engine_file_that_sets_many_keys_twice_is_read_in_linear_time() -> None:
    Path("x.json").write_text("{" + ",".join(['"a": 1'] * 100_000) + "}")
    started = time.monotonic()
    assert "x.json: a is set twice in one block. Remove one" in check_engine_file("x.json")
    assert time.monotonic() - started < 10


def test_an_engine_file_that_comes_through_a_pipe_is_read_once() -> None:
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text(GOOD))
    writer.start()
    time.sleep(0.1)
    config = load_config(["--ds_config", "pipe"])
    writer.join()
    assert engine_dict("pipe", config, 1)["zero_optimization"] == {"stage": 3}


def test_a_pipe_that_nobody_writes_to_is_no_engine_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "PATIENCE_S", 0.2)
    os.mkfifo("silent")
    keeps_it_open = os.open("silent", os.O_RDWR)
    with pytest.raises(ConfigError, match="it is a pipe that did not end within"):
        load_config(["--ds_config", "silent"])
    os.close(keeps_it_open)


@pytest.mark.parametrize("path", ["/dev/zero", ".", "/dev/null"])
def test_what_is_no_file_is_no_engine_file(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--ds_config", path])
    assert path in caught.value.problems[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank: 8\nrank: 9\n", "g.yaml sets rank twice"),
        ("rank: [[[8]]]\n", "rank has a list in a list in a list"),
        ("rank: [{a: 1}]\n", "rank has a map"),
        ("rank: {a: 1}\n", "rank has a map"),
        ('data: "/x\\n--debug"\n', "data has a value with a line break"),
        ('data: ["a", "/x\\r--debug"]\n', "data has a value with a line break"),
        ("data: --debug\n", "data has a value that begins with --"),
        ("rank: &a [1, 2]\nseed: *a\n", "the alias *a stands for no single value"),
        (BOMB, "the alias *a stands for no single value"),
        ("", "must hold 'name: value' lines, but is empty"),
        ('data: ""\n', "--data is empty"),
        ('output_dir: ""\n', "output_dir of a sweep must be one folder"),
        ("output_dir: [a, b]\n", "output_dir of a sweep must be one folder"),
        (
            "".join(f"{n}: [{', '.join(map(str, range(300)))}]\n" for n in ("seed", "rank", "x")),
            "The sweep has 27000000 runs, but at most 10000",
        ),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused(text: str, said: str) -> None:
    Path("g.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_grid(["g.yaml"])
    assert said in str(caught.value)


def test_a_task_of_an_array_checks_its_own_run_alone() -> None:
    """A thousand tasks would otherwise check a thousand runs each."""
    Path("g.yaml").write_text("rank: [8, 0]\n")
    assert load_grid(["g.yaml", "0"]).number == 0
    with pytest.raises(UserError, match="run rank=0"):
        load_grid(["g.yaml", "1"])


@pytest.mark.parametrize("kind", ["broken link", "folder"])
def test_a_named_file_of_this_folder_comes_first_whatever_it_is(kind: str) -> None:
    """A disk that is away would else change which file is read."""
    Path("configs").mkdir(exist_ok=True)
    here = Path("configs/demo.yaml")
    here.mkdir() if kind == "folder" else here.symlink_to("nowhere")
    assert CONFIG.find("demo") == str(here)
    with pytest.raises(ConfigError, match=r"configs/demo\.yaml"):
        load_config(["--config", "demo"])


def test_an_engine_file_of_this_folder_is_named_by_its_path() -> None:
    Path("ds_configs").mkdir(exist_ok=True)
    Path("ds_configs/zero3.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"ds_configs/zero3\.json: zero_optimization\.stage is"):
        load_config(["--ds_config", "zero3"])


def test_the_command_for_an_array_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_lora_dist.config.sweep import show

    Path("my $(x).yaml").write_text("rank: [8, 16]\n")
    show(load_grid(["my $(x).yaml"]))
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith("slurm/train_array.sbatch 'my $(x).yaml'")
    )


@pytest.mark.usefixtures("processes")
def test_bash_can_substitute_the_engine_file(full: None) -> None:
    program = f"{sys.executable} {REPOSITORY}/launcher/plan.py"
    model = REPOSITORY / "assets/base"
    line = f"{program} --model {model} --ds_config <(cat ds_configs/zero3.json) --json"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("value", ["!!set {a, b}", "!!omap [a: 1]", "[!!binary aGk=]"])
def test_tags_that_make_no_list_are_refused(value: str) -> None:
    assert "is not allowed. Write a list as [a, b]" in refusal(f"column_names: {value}\n")


@pytest.mark.parametrize("value", ["12e3456", "007", "true"])
def test_a_revision_that_yaml_reads_as_a_number_is_to_be_quoted(value: str) -> None:
    assert 'Put the text in quotes: revision: "..."' in refusal(f"revision: {value}\n")


@pytest.mark.parametrize("value", ["[all-linear, q_proj]", "[all-linear]", "q_proj,all-linear"])
def test_all_linear_stands_alone(value: str) -> None:
    said = "must be all-linear alone or names alone"
    assert said in refusal(f"target_modules: {value}\n")
