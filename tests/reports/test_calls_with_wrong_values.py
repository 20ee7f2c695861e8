"""Calls of the Python API with values that no option takes, and in unusual programs."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

import sparse_lora_dist as sld
from sparse_lora_dist.base_model.architecture import meta_model
from sparse_lora_dist.errors import ConfigError, UserError


@pytest.mark.parametrize("name", ["print_config", "help", "help_all"])
def test_options_that_print_are_for_the_command_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is for the command line"):
        sld.settings(**{name: True})


@pytest.mark.parametrize("value", [b"x", {"a": 1}, [["a"]]])
def test_a_value_of_a_type_that_no_option_takes(value: object) -> None:
    with pytest.raises(ConfigError, match="output_dir must be a str, Path, number"):
        sld.settings(output_dir=value)


@pytest.mark.usefixtures("processes")  # importing DeepSpeed starts a compiler
@pytest.mark.parametrize("output", [None, b"bytes", 3])
def test_an_export_into_something_that_is_no_path(output: Any) -> None:
    with pytest.raises(UserError, match="output must be a str or a Path"):
        sld.export_run("run", output)


@pytest.mark.usefixtures("processes")  # importing DeepSpeed starts a compiler
def test_functions_that_get_something_else() -> None:
    wrong: Any = {"rank": 4}
    with pytest.raises(UserError, match=r"what settings\(\) returns, got dict"):
        sld.run(wrong)
    with pytest.raises(UserError, match="a model and the path of a folder, got Linear and dict"):
        sld.apply_sparse_delta(nn.Linear(1, 1), wrong)


def test_the_output_folder_stays_if_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = sld.settings(output_dir="run", base_cache="cache")
    assert (config.run.output_dir, config.model.base_cache) == (
        str(tmp_path / "run"),
        str(tmp_path / "cache"),
    )


def test_a_live_config_of_deepspeed_shards_no_model() -> None:
    live = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    config = AutoConfig.for_model("gpt2", vocab_size=9, n_embd=8, n_head=2, n_layer=1)
    options: dict[str, Any] = {"attn_implementation": None, "trust_remote_code": False}
    model = meta_model(config, task="causal_lm", dtype=None, **options)
    assert all(p.numel() > 0 for p in model.parameters())
    assert is_deepspeed_zero3_enabled() and live.is_zero3()


@pytest.mark.usefixtures("processes")
def test_a_wheel_that_is_not_installed(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(str(sld.__file__), "sparse_lora_dist/__init__.py")
        file.write(
            str(Path(str(sld.__file__)).with_name("version.py")), "sparse_lora_dist/version.py"
        )
    program = f"import sys; sys.path.insert(0, {str(wheel)!r}); import sparse_lora_dist"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "cannot be imported from within a wheel" in done.stderr.splitlines()[-1]
