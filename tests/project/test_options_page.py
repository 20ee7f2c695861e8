"""docs/options.md is what docs/generate_options.py makes of the options."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_lora_dist.config.schema import known_options

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("processes")
def test_the_page_of_options_is_that_of_the_code() -> None:
    """Mended by ``python docs/generate_options.py > docs/options.md``."""
    command = [sys.executable, "docs/generate_options.py"]
    made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert made == (ROOT / "docs" / "options.md").read_text()
    assert all(f"`{name}`" in made for name in known_options())
