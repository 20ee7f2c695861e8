"""The tests of ``make smoke``: a law of every method, resume, export, a launcher; about sixty."""

from fnmatch import fnmatch

SMOKE = (
    "training/test_laws.py::test_a_run_goes_on_on_other_numbers_of_ranks*",
    "training/test_runs.py::test_stop_and_resume_is_bit_for_bit_*(bf16)",
    "training/test_runs.py::test_resume_from_a_named_checkpoint_*",
    "training/test_runs_of_before.py::test_what_a_run_of_before_saved_*(adalora)",
    "base_model/test_base_model.py::test_shares_together_are_what_*(2)",
    "base_model/test_base_model.py::test_every_family_*(llama-1)",
    "base_model/test_base_model.py::test_every_family_*(mixtral-1)",
    "tasks/test_packing_engine.py::*(false-sdpa)",
    "export/test_export.py::test_peft_computes_the_logits_of_the_trained_engine(plain)",
    "distributed/test_launchers.py::test_torchrun",
    "distributed/test_launchers.py::test_a_mistake_is_status_2_and_debug_shows_where",
    "config/test_configs.py::test_a_file_is_read_by_its_program*",
    "project/test_method_pages.py::test_an_example_has_options_that_the_program_takes*",
    "project/test_structure.py::test_only_*",
    "project/test_structure.py::test_folders_stay_small",
)
"""Patterns of test ids after ``tests/``, with parentheses for brackets."""


def is_smoke(test_id: str) -> bool:
    """Return whether a test is one of ``make smoke``."""
    name = test_id.removeprefix("tests/").replace("[", "(").replace("]", ")")
    return any(fnmatch(name, pattern) for pattern in SMOKE)
