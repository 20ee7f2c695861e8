"""Where each test of commit 71bf4ff is today.

    python -m tests.project.id_map          how many are where; status 1 if one is nowhere
    python -m tests.project.id_map --all    old id, new id, a line each

``ids_of_71bf4ff.txt`` has the ids of then. A test was moved into a folder; or renamed, where its
name held a word that has another meaning now; or its parameters are named otherwise, where they are
texts of messages; or it gave way to another that checks the same.
"""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

OLD = Path(__file__).with_name("ids_of_71bf4ff.txt")
FOLDERS = {
    "adapter": "adapter penalty",
    "base_model": "bad_model_folder base_cache base_model gpu_load memory",
    "checkpoint": "checkpoint_kinds recovery reset saved_slices",
    "config": "bad_input config ds_configs engine_config grid",
    "data": "data data_rows data_tokens",
    "distributed": "comm launch launchers",
    "editing": "editing",
    "evaluation": "evaluation",
    "export": "export export_program lm_eval union",
    "methods": (
        "adalora bits cola counts hashed increlora lora_mini lorta losa melora methods "
        "mora neat prilora pst roselora sara sbora shira sora triplets"
    ),
    "optim": "learning_rate optim",
    "plan": "plan rehearsal",
    "project": "assets docs structure",
    "report": "report",
    "run_folder": "run_lock",
    "runtime": "signal_lead stopping watch",
    "show": "show",
    "sparsity": "decisions rewriter scores shared",
    "tasks": "classifier classifier_runs head packing_engine",
    "training": "growth_runs health laws method_runs reference runs toy_tasks",
    "zero3": "heap nvme zero3_contract",
}
"""Folder of today -> the files of then that are in it, without test_ and .py."""
RENAMED = {
    "test_empty_yaml_changes_nothing": "test_empty_yaml_is_refused",
    "test_methods_and_schedules_import_torch_and_each_other_only": (
        "test_methods_import_torch_and_each_other_only"
    ),
    "test_a_run_that_goes_back_by_name_leaves_no_later_step_behind": (
        "test_a_run_that_goes_back_by_name_keeps_the_later_steps_under_another_name"
    ),
    "test_a_batch_moves_whole": "test_a_batch_is_of_whole_numbers",
    "test_four_files_are_shipped": "test_five_files_are_shipped",
    "test_help_lists_every_flag_and_method": "test_help_all_lists_every_flag_and_method",
    "test_the_tables_in_readme_are_those_of_the_results": (
        "test_the_pages_of_results_are_those_of_the_benchmarks"
    ),
    "test_every_option_that_the_pages_name_is_one": "test_options_that_the_pages_name_exist",
    "test_a_range_reaches_the_gpu_in_pieces_as_it_is_in_the_file": (
        "test_a_range_reaches_the_gpu_in_components_as_it_is_in_the_file"
    ),
}
"""Names of functions, beside those in which a piece became a component."""
_WANDB = (
    "tests/checkpoint/test_reset.py::"
    "test_a_resumed_run_is_the_same_run_to_wandb_and_rank_0_alone_writes_it"
)
REPLACED = {
    "tests/test_reset.py::test_a_resumed_run_is_the_same_run_to_its_tracker": _WANDB,
    "tests/test_runs.py::test_wandb_offline_writes_on_rank_0_only": _WANDB,
}
"""Tests of then that gave way to one that checks the same."""
A_TEST_A_FILE = {
    "test_files_and_functions_stay_readable",
    "test_methods_import_torch_and_each_other_only",
    "test_a_tracker_that_is_not_installed_is_told",
    "test_options_that_the_pages_name_exist",
}
"""Functions whose parameters are found anew, one a file or one a package: any stands for all."""


def collected() -> list[str]:
    """Ids of all tests of today."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts="]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if "::" in line]


def function_of(test_id: str) -> str:
    return test_id.partition("[")[0]


def moved(test_id: str) -> str:
    """The id under which a test of then would stand today, its parameters as they were."""
    if test_id in REPLACED:
        return REPLACED[test_id]
    file, _, test = test_id.partition("::")
    stem = Path(file).stem.removeprefix("test_")
    for folder, stems in FOLDERS.items():
        if file.count("/") == 1 and stem in stems.split():
            file = f"tests/{folder}/test_{stem}.py"
    name, bracket, parameters = test.partition("[")
    name = RENAMED.get(name, name)
    name = re.sub(r"(?<=_)piece(s?)(?=_|$)", r"component\1", name)
    return f"{file}::{name}{bracket}{parameters}"


def where_all_are(old: Iterable[str], new: Iterable[str]) -> dict[str, str | None]:
    """Old id -> new id; None where there is none."""
    exist = set(new)
    places: dict[str, str | None] = {one: moved(one) for one in old}
    left = defaultdict(list)
    for one, place in places.items():
        assert place is not None
        if place not in exist:
            left[function_of(place)].append(one)
    taken = set(places.values())
    free = defaultdict(list)
    for one in new:
        if one not in taken:
            free[function_of(one)].append(one)
    for function, ones in left.items():
        others = free[function]
        if others and function.partition("::")[2] in A_TEST_A_FILE:
            others = others * len(ones)
        # Parameters stand in the order of the file, so the n-th of then is the n-th of now.
        fits = len(others) >= len(ones)
        places |= dict(zip(ones, others if fits else [None] * len(ones), strict=False))
    return places


def main() -> int:
    old = OLD.read_text().split("\n")[:-1]
    places = where_all_are(old, collected())
    if "--all" in sys.argv:
        for one, place in places.items():
            print(f"{one}  ->  {place}")
    same = sum(moved(one) == place for one, place in places.items())
    nowhere = [one for one, place in places.items() if place is None]
    print(
        f"{len(old)} tests of 71bf4ff: {same} moved as they were, {len(old) - same - len(nowhere)} "
    )
    print(f"named otherwise, {len(nowhere)} without a place")
    for one in nowhere:
        print(f"  {one}")
    return int(bool(nowhere))


if __name__ == "__main__":
    sys.exit(main())
