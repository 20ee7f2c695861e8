"""Whatever lies in and around the output folder, no program touches a file that none has made."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.reports.test_a_folder_belongs_to_one_run import EDITED, TRIED, edit_flags
from tests.tiers import in_full

pytestmark = pytest.mark.usefixtures("processes")
NO_RANKS = "tests.work.trees:exported"


@pytest.fixture(scope="module")
def made(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder in each state that a program leaves it in."""
    folder = tmp_path_factory.mktemp("states")
    flags = tiny.flags(folder / "run", max_steps=3, save_every=1, stop_after=2)
    ranks(1, TRIED, flags=flags)
    before = shutil.copytree(folder / "run", folder / "run of before")
    for name in (".sparse_lora_dist.json", "chat_template.jinja", "generation_config.json"):
        for path in before.rglob(name):  # such a version wrote none of them
            path.unlink()
    ranks(1, EDITED, flags=edit_flags(tiny, folder / "edits"))
    ranks(1, NO_RANKS, argv=[str(folder / "run"), "--output", str(folder / "export")])
    return {name: str(folder / name) for name in ("run", "run of before", "edits", "export")}


@pytest.mark.parametrize(("trees", "same_each_time"), [(12, True), in_full(50, False)])
def test_each_file_of_a_user_is_what_and_where_it_was(
    ranks: Ranks,
    tiny: TinyRun,
    made: dict[str, str],
    tmp_path: Path,
    trees: int,
    same_each_time: bool,
) -> None:
    train = tiny.flags(tmp_path, max_steps=3, stop_after=3, keep_last=1, keep_best=False)
    edit = edit_flags(tiny, Path(made["edits"]))
    words = {"train": train, "edit": edit}
    options = {"made": made, "words": words, "examples": trees, "derandomize": same_each_time}
    (counts,) = ranks(1, "tests.work.trees:users_files_stay", folder=tmp_path, **options)
    print(json.dumps(counts))
    assert counts["done"] + counts["refused"] >= trees and counts["done"] > 0
