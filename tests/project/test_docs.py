"""The examples of docs/python.md, each run as it stands in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_lora_dist.config.schema import known_options

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs_as_it_stands(number: int, tmp_path: Path) -> None:
    for name in ("assets", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "example.py").write_text(EXAMPLES[number])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ["adapter/adapter_model.safetensors", "entries live", "weights changed"][number]
    assert expected in done.stdout or list(tmp_path.glob(f"runs/*/{expected}"))
    assert "Warning" not in done.stderr


def test_every_option_that_the_pages_name_is_one() -> None:
    options = known_options()
    text = (ROOT / "docs" / "from_peft.md").read_text()
    named = set(re.findall(r"--(\w+)", text)) - {"config", "format", "output"}
    assert len(named) > 20 and named <= options.keys(), named - options.keys()
