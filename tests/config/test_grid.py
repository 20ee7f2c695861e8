"""A sweep's file becomes command lines that launcher/train.py takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_lora_dist.config.sweep import load_grid, show
from sparse_lora_dist.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def grid(folder: Path, text: str) -> str:
    path = folder / "grid.yaml"
    path.write_text(text)
    return str(path)


def test_every_combination_is_a_run_with_a_folder_of_its_own(tmp_path: Path) -> None:
    text = """
        output_dir: out
        learning_rate: [2e-4, 1e-3]
        double_quant: true
        target_modules: [all-linear, [q_proj, v_proj]]
    """
    runs = load_grid([grid(tmp_path, text)]).runs
    assert list(runs) == [
        "learning_rate=2e-4,target_modules=all-linear",
        "learning_rate=2e-4,target_modules=q_proj,v_proj",
        "learning_rate=1e-3,target_modules=all-linear",
        "learning_rate=1e-3,target_modules=q_proj,v_proj",
    ]
    last = "--double_quant true --learning_rate 1e-3 --target_modules q_proj,v_proj --output_dir"
    assert runs["learning_rate=1e-3,target_modules=q_proj,v_proj"] == [
        *last.split(),
        "out/learning_rate=1e-3,target_modules=q_proj,v_proj",
    ]


def test_values_that_are_paths_stay_out_of_the_folders_path(tmp_path: Path) -> None:
    data = [tmp_path / "a.jsonl", tmp_path / "b c.jsonl"]
    for file in data:
        file.write_text('{"text": "a"}\n')
    runs = load_grid([grid(tmp_path, f"data: ['{data[0]}', '{data[1]}']")]).runs
    assert [("/" in name, " " in name) for name in runs] == [(False, False)] * 2
    assert [flags[1] for flags in runs.values()] == [str(file) for file in data]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak: [8, 16]", "--rnak is not an option; did you mean --rank?"),
        ("rank: [8, 0]", "run rank=0: "),
        ("rank: [8, 8]", "share the folder runs/grid/rank=8"),
        ("rank: []", "describes no run"),
        ("trackers: []", "gets an empty one as [[]]"),
        ("output_dir: null\nlora_alpha: 1", "is not an option"),
        ("learning_rate: [1e-3, 0.001]", "and learning_rate=0.001 have the same options"),
        ("packing: [true, True]", "packing=true and packing=True have the same options"),
        ("--rank: [8, 16]", "----rank is not an option"),
        ("method: {lora: 1}", "must hold 'name: value'"),
        ("- 8", "must hold 'name: value'"),
        ("rank: [8", "cannot be read"),
        ("print_config: true", "--print_config cannot be given in or after a sweep's file"),
        ("rank: [8, 16]\nrank: [4]", "sets rank twice"),
        ("rank: [[[8]]]", "a list in a list in a list"),
        ("rank: [{a: 8}]", "a map"),
        ('data: "/x\\n--debug"', "a value with a line break"),
        ("output_dir: [a, a]", "must be one folder"),
        ("\n".join(f"o{i}: [1,2,3,4,5,6,7,8,9,10]" for i in range(8)), "has 100000000 runs"),
    ],
)
def test_what_cannot_run_is_said_before_it_is_queued(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_grid([grid(tmp_path, text)])
    assert said in str(caught.value)


def test_a_number_of_a_sweep_without_runs_says_that_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="describes no run"):
        load_grid([grid(tmp_path, "rank: []"), "0"])


def test_an_option_that_is_given_again_is_no_word_of_a_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    show(load_grid([grid(tmp_path, "rank: [8, 16]\nalpha: 8"), "0", "--alpha", "4"]))
    words = capfd.readouterr()
    assert words.out.splitlines()[-2:] == ["--alpha", "4"] and "note" not in words.out + words.err


@pytest.mark.parametrize("number", ["2", "-1", "x", "\u0662"])
def test_a_number_without_a_run_names_the_array(tmp_path: Path, number: str) -> None:
    with pytest.raises(UserError, match="sbatch --array=0-1"):
        load_grid([grid(tmp_path, "rank: [8, 16]"), number])


def test_options_after_the_file_apply_to_all_runs_and_come_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = grid(tmp_path, "rank: [8, 16]\noutput_dir: out")
    show(load_grid([path, "--max_steps", "5"]))
    assert capsys.readouterr().out.endswith(f"train_array.sbatch {path} --max_steps 5\n")
    for number in ([], ["1"]):
        runs = load_grid([path, *number, "--max_steps", "5", "--debug"]).runs
        last = "--rank 16 --output_dir out/rank=16 --max_steps 5 --debug"
        assert runs["rank=16"] == last.split()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--output_dir runs/x", "--output_dir after the sweep's file would put all runs into one"),
        ("--output_dir=runs/x", "--output_dir after the sweep's file would put all runs into one"),
        ("--rank 4", "--rank is varied by the sweep"),
        ("--rnak 4", "--rnak is not an option; did you mean --rank?"),
        ("--max_steps 0", "run rank=8: "),
        ("--help", "--help cannot be given in or after a sweep's file"),
        ("--data", "--data"),
    ],
)
def test_options_after_the_file_that_no_sweep_can_take_are_refused_before_it_is_queued(
    tmp_path: Path, more: str, said: str
) -> None:
    for number in ([], ["0"]):
        with pytest.raises(UserError) as caught:
            load_grid([grid(tmp_path, "rank: [8, 16]"), *number, *more.split()])
        assert said in str(caught.value)


def test_a_line_break_after_the_file_is_refused_as_one_in_it(tmp_path: Path) -> None:
    path = grid(tmp_path, "rank: [8, 16]")
    with pytest.raises(UserError, match="line break"):
        load_grid([path, "0", "--data", "x\n--debug"])


@pytest.mark.usefixtures("processes")
def test_the_program_lists_all_runs_or_prints_one(tmp_path: Path) -> None:
    command = [sys.executable, "launcher/grid.py", "slurm/grid.yaml"]
    listed, one = (
        subprocess.run(
            [*command, *more], cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        for more in ([], ["3"])
    )
    assert listed[3].split() == ["3", "method=roselora,rank=16"]
    assert "sbatch --array=0-5 slurm/train_array.sbatch slurm/grid.yaml" in listed[-1]
    assert one[-1] == "runs/grid/method=roselora,rank=16"
