"""Someone installs the package and works in a folder of his own, without a clone: programs, engine
files, configs and the embedded model are there under names."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path

import pytest

import sparse_lora_dist
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sweep import load_grid
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.examples import FOLDERS, copy, load_request
from sparse_lora_dist.system import program_names
from sparse_lora_dist.system.program_names import PROGRAMS, as_started_here
from sparse_lora_dist.system.shipped import ASSETS, CONFIG, ENGINE, SHIPPED

REPOSITORY = Path(sparse_lora_dist.__file__).parents[1]
SOURCES = ("sparse_lora_dist", "assets", *FOLDERS)
"""Folders that a wheel is made of."""
SMALL = "--max_steps 2 --sequence_length 256 --micro_batch_size 1 --rank 2 --eval_batches 1".split()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a Python environment that has the commands."""
    binaries = elsewhere.parent / f"{elsewhere.name}-env" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "sparse-lora-train").touch()
    monkeypatch.setattr(program_names.sys, "executable", str(binaries / "python"))
    return elsewhere


def test_an_engine_file_is_taken_by_name_from_any_folder(elsewhere: Path) -> None:
    for name in ENGINE.names():
        content = json.loads(Path(ENGINE.find(name)).read_text())
        assert content == json.loads((REPOSITORY / f"ds_configs/{name}.json").read_text())
    assert load_config([]).run.ds_config == load_config(["--ds_config", "zero3"]).run.ds_config


def test_a_file_of_the_working_directory_comes_before_the_one_of_the_package(
    elsewhere: Path,
) -> None:
    assert ENGINE.notes("zero3") == []
    (elsewhere / "ds_configs").mkdir()
    own = elsewhere / "ds_configs/zero3.json"
    shutil.copy(REPOSITORY / "ds_configs/zero3.json", own)
    assert ENGINE.notes("zero3") == []
    own.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigError, match="zero_optimization.stage"):
        load_config([])
    (note,) = ENGINE.notes("zero3")
    assert note == (
        "--ds_config zero3 is ds_configs/zero3.json, not the file that comes with the package"
    )
    assert ENGINE.notes(str(own)) == []


def test_an_unknown_engine_file_is_refused_with_the_names(elsewhere: Path) -> None:
    for wrong in ("zero3_offlod", "a/zero9.json"):
        with pytest.raises(ConfigError) as caught:
            load_config(["--ds_config", wrong])
        assert (
            f"--ds_config {wrong} does not exist. Name a file, or one that comes with the package: "
            f"whole, zero3, zero3_hpz, zero3_nvme, zero3_offload"
        ) in str(caught.value)


def test_a_config_is_taken_by_name_from_any_folder(elsewhere: Path) -> None:
    config = load_config(["--config", "demo"])
    assert (config.adapter.method, config.run.output_dir) == ("roselora", "runs/demo")
    assert len(load_grid(["sweep"]).runs) == 12
    with pytest.raises(UserError, match=r"--config dmo cannot be read .* one that comes with the"):
        load_config(["--config", "dmo"])
    (elsewhere / "mine").write_text("rank: 3\n")  # a file is a file, whatever it is called
    assert load_config(["--config", "mine"]).adapter.rank == 3
    assert CONFIG.find("mine") == "mine"


def test_every_config_works_from_any_folder(elsewhere: Path) -> None:
    for name in CONFIG.names():
        text = Path(CONFIG.find(name)).read_text()
        assert "ds_configs/" not in text, f"{name} names a file that only a clone has"


def test_what_comes_with_the_package_is_no_second_copy() -> None:
    assert {p.name for p in SHIPPED.iterdir()} == {"README.md", "assets", *FOLDERS}
    for name in ("assets", *FOLDERS):
        assert (SHIPPED / name).is_symlink()
        assert (SHIPPED / name).resolve() == REPOSITORY / name
    assert ASSETS == REPOSITORY / "assets"


def test_programs_are_named_as_they_can_be_started(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Run launcher/export.py, or python launcher/show.py. See my/launcher/train.py."
    assert as_started_here(text) == (
        "Run sparse-lora-export, or sparse-lora-show. See my/launcher/train.py."
    )
    assert as_started_here("usage: deepspeed --quiet --num_gpus 2 launcher/train.py --rank 2") == (
        "usage: deepspeed --quiet --num_gpus 2 --module sparse_lora_dist.train --rank 2"
    )
    assert as_started_here(".venv/bin/python launcher/plan.py --config a") == (
        ".venv/bin/sparse-lora-plan --config a"
    )
    (gone := installed / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert as_started_here("Run launcher/export.py.") == "Run sparse-lora-export."
    monkeypatch.chdir(installed)
    (installed / "launcher").mkdir()  # of another project
    assert as_started_here(text) != text
    (installed / "launcher/train.py").touch()
    assert as_started_here(text) == text


def test_a_clone_that_is_not_installed_has_files_only(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_names.sys, "executable", str(elsewhere / "bin/python"))
    neighbours = REPOSITORY / "launcher"
    assert as_started_here("python launcher/plan.py") == f"python {neighbours}/plan.py"
    (elsewhere / "a b/launcher").mkdir(parents=True)
    (elsewhere / "a b/launcher/eval.py").touch()
    monkeypatch.setattr(program_names.sys, "argv", ["a b/launcher/eval.py"])
    assert as_started_here("python launcher/plan.py") == "python 'a b/launcher/plan.py'"


def test_each_program_is_a_file_a_command_and_a_module() -> None:
    assert {p.stem for p in (REPOSITORY / "launcher").glob("*.py")} == set(PROGRAMS)
    commands = (REPOSITORY / "setup.cfg").read_text()
    for name in PROGRAMS:
        assert f"sparse-lora-{name} = sparse_lora_dist.programs:" in commands
        spec = find_spec(f"sparse_lora_dist.{name}")
        assert spec is not None
        if spec.submodule_search_locations:
            assert find_spec(f"sparse_lora_dist.{name}.__main__") is not None


def test_the_examples_are_copied_and_replace_nothing(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(load_request(["work"]))
    for name in FOLDERS:
        files = {p.name for p in (REPOSITORY / name).iterdir()} - {"__pycache__"}
        assert {p.name for p in (elsewhere / "work" / name).iterdir()} == files
    assert "are in work" in capsys.readouterr().out
    (elsewhere / "mine/slurm").mkdir(parents=True)
    for words, said in (
        (["work"], "work holds configs, ds_configs, launcher, slurm already"),
        (["mine"], "mine holds slurm already, and nothing is replaced"),
        ([], "usage: sparse-lora-examples FOLDER"),
        (["a", "b"], "usage: sparse-lora-examples FOLDER"),
    ):
        with pytest.raises(UserError, match=said):
            load_request(words)
    assert list((elsewhere / "mine").iterdir()) == [elsewhere / "mine/slurm"]


class Installed:
    """The wheel in a virtual environment of its own, which lies in another project's repository.
    Other packages are those of the environment that runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        self._venv = folder / "work/.venv"
        sources = folder / "sources"
        for name in SOURCES:
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, sources / name, symlinks=True, ignore=skip)
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, sources)
        python = self._venv / "bin/python"
        usual = [sys.executable, "-m", "pip"]
        offline = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
        wheel = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder)]
        self._check(*usual, *wheel, str(sources))
        shutil.rmtree(sources)  # nothing may come from there
        self._check(sys.executable, "-m", "venv", "--without-pip", str(self._venv))
        (self.wheel,) = folder.glob("*.whl")
        self._check(*usual, "--python", str(python), "install", *offline, str(self.wheel))
        packages = get_path("purelib", vars={"base": str(self._venv)})
        Path(packages, "others.pth").write_text(get_path("purelib"))
        git = ["git", "-C", str(self.work), "-c", "user.name=x", "-c", "user.email=x@x"]
        self._check("git", "init", "--quiet", str(self.work))
        self._check(*git, "commit", "--quiet", "--allow-empty", "-m", "another project")

    def _check(self, *command: str) -> str:
        kept = {"PATH", "HOME", "TMPDIR", "LANG"}
        environment = {name: value for name, value in os.environ.items() if name in kept}
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(
            command, cwd=self.work, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def __call__(self, program: str, *words: str) -> str:
        """Output of a command of the environment."""
        return self._check(str(self._venv / "bin" / program), *words)


@pytest.mark.usefixtures("full", "processes")
def test_a_wheel_trains_plans_exports_and_reports_from_any_folder(tmp_path: Path) -> None:
    start = Installed(tmp_path)
    assert start.wheel.stat().st_size < 12e6
    assert start("python", "-c", "import sparse_lora_dist as s; print(s.__file__)").startswith(
        str(tmp_path)
    )
    said = start("sparse-lora-train", "--output_dir", "runs/a", *SMALL)
    assert "2 of 2 steps" in said
    assert "launcher/" not in said and "--module sparse_lora_dist.train --config" in said
    found = json.loads((start.work / "runs/a/environment.json").read_text())
    assert found["git_commit"] is None

    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "sparse_lora_dist.train", "--ds_config", "zero3_offload"]
    assert "on 2 ranks" in start("python", *ranks, *module, "--output_dir", "runs/b", *SMALL)
    plan = start("sparse-lora-plan", "--config", "demo", "--world_size", "8")
    assert "per GPU" in plan or "host memory" in plan
    start("sparse-lora-export", "runs/a", "--output", "exported")
    assert (start.work / "exported/adapter_model.safetensors").is_file()
    start("sparse-lora-report", "runs/a", "runs/b")
    assert (start.work / "runs/a/report.html").is_file()
    assert "q_proj" in start("python", "-m", "sparse_lora_dist.show", "runs/a/adapter")

    for name in PROGRAMS:
        page = start("python", "-m", f"sparse_lora_dist.{name}", "--help")
        assert "usage:" in page and "launcher/" not in page.splitlines()[0]
    start("sparse-lora-examples", "mine")
    page = start("python", "mine/launcher/grid.py", "mine/slurm/grid.yaml")
    assert "all of them: sbatch" in page
