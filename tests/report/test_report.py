"""The report: what it draws is what the files say, and its page asks nobody for anything."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing import event_accumulator

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report import curves
from sparse_lora_dist.report import distributions as spread
from sparse_lora_dist.report import saved_steps as saved
from sparse_lora_dist.report.layer_grid import layout_of
from sparse_lora_dist.report.page import GENERATOR, overview, write_page
from sparse_lora_dist.report.ranks import final_map, growth
from sparse_lora_dist.report.report_command import names_of, report, run_section, shared_section
from sparse_lora_dist.report.report_options import load_request
from sparse_lora_dist.report.run_data import RunData, read_run
from sparse_lora_dist.report.saved_steps import SavedStep
from sparse_lora_dist.report.style import FAINT, SERIES, TEXT, Picture
from sparse_lora_dist.report.timeline import timeline
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.system.processes import Process, this_process
from tests.conftest import Ranks
from tests.fixtures.browser import Browser, found
from tests.fixtures.tiny_run import TinyRun

ROOT = Path(__file__).parents[2]
SITES = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"]
BEGINS = {"event": "begins", "time": 1000.0, "reached": 0, "world_size": 2, "total_steps": 8}


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def decision(step: int, *ranks: int) -> dict[str, Any]:
    of_sites = dict(zip(SITES, ranks, strict=True))
    live = {site: 10 * rank for site, rank in of_sites.items()}
    return {"step": step, "budget": float(sum(ranks)), "ranks": of_sites, "live": live}


def write_run(folder: Path, **options: Any) -> Path:
    """Eight steps by two jobs, the first of which was killed after step 5, saved at 4."""
    folder.mkdir(parents=True)
    said = {"method": "increlora", "model": "default", "rank": 4, "learning_rate": 1e-3} | options
    (folder / "run.yaml").write_text(yaml.safe_dump(said))
    about = {"world_size": 2, "device": "cpu", "command": ["train.py"], "git_commit": "abc"}
    (folder / "environment.json").write_text(json.dumps(about))
    rows = [
        {
            "step": step,
            "loss": 5.0 - step / 4 if step != 3 else None,
            "tokens_per_s": 100.0 + step,
            "peak_memory_bytes": step * 10**9,
            "live_entries": 40 * step,
            "budget": float(step),
        }
        for step in range(1, 9)
    ]
    rows[-1]["held_out_loss"] = 3.5
    lines(folder / "metrics.jsonl", {"step": 0, "held_out_loss": 4.5}, *rows)
    lines(folder / "decisions.jsonl", decision(2, 1, 1, 2, 1), decision(6, 1, 4, 3, 0))
    lines(
        folder / "attempts.jsonl",
        BEGINS | {"step": 0},
        BEGINS | {"step": 4, "reached": 5, "time": 2000.0, "world_size": 4},
        {"event": "finished", "step": 8, "time": 2090.0, "why": ""},
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def page_of(*runs: Path, flags: tuple[str, ...] = ()) -> str:
    request = load_request([*map(str, runs), *flags])
    report(request)
    return request.output.read_text()


def text_of(*runs: Path, flags: tuple[str, ...] = ()) -> str:
    """The page with empty figures: most of a page's time is drawing SVG."""
    with patch("sparse_lora_dist.report.page.as_svg", lambda picture, place: "<svg></svg>"):
        return page_of(*runs, flags=flags)


def save_mark(picture: Picture, path: Path, *, maker: str) -> None:
    """In place of ``save_png``: a file that bears the maker, without a picture."""
    path.write_bytes(maker.encode())


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    return [write_run(folder / "run"), write_run(folder / "a<b>", learning_rate=2e-3)]


@pytest.fixture(scope="module")
def page_of_two(two_runs: list[Path]) -> str:
    return page_of(*two_runs, flags=("--output", str(two_runs[0].parent / "both.html")))


@pytest.fixture(scope="module")
def page_of_real(real: Path) -> str:
    return page_of(real)


# Figures


def test_curves_hold_the_numbers_of_the_file_and_no_null(run: Path) -> None:
    every, mean, held_out = curves.loss([read_run(run)]).figure.axes[0].lines
    assert list(every.get_xdata()) == [1, 2, 4, 5, 6, 7, 8]
    assert list(every.get_ydata()) == [4.75, 4.5, 4.0, 3.75, 3.5, 3.25, 3.0]
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([0, 8], [4.5, 3.5])
    live, budget = curves.live([read_run(run)]).figure.axes
    assert list(live.lines[0].get_ydata()) == [40 * step for step in range(1, 9)]
    assert budget.get_title(loc="left") == "budget"


def test_a_running_mean_damps_noise_and_leaves_a_slope_where_it_is() -> None:
    assert curves.running_mean(range(100)) == list(range(100))
    noisy = curves.running_mean([0.0, 2.0] * 50)
    assert noisy[0] == 0.0 and all(abs(value - 1.0) <= 0.34 for value in noisy[1:-1])


def test_a_long_curve_is_thinned_to_means_and_a_plateau_to_its_ends() -> None:
    steps, values = curves.thinned((range(1, 2401), [0.0, 2.0, 1.0, 5.0] * 600))
    assert (steps[:2], steps[-1], set(values), len(steps)) == ([2.5, 6.5], 2398.5, {2.0}, 600)
    assert curves.thinned(([1, 2], [3.0, 4.0])) == ([1, 2], [3.0, 4.0])
    plateaus = curves.without_plateaus((range(10), [7] * 5 + [8] * 5))
    assert plateaus == ([0, 4, 5, 9], [7, 7, 8, 8])


def test_throughput_of_a_rank_is_that_of_the_job_that_made_the_step_last(run: Path) -> None:
    whole, a_rank = curves.throughput([read_run(run)]).figure.axes[0].lines
    ratios = np.array(whole.get_ydata()) / np.array(a_rank.get_ydata())
    assert ratios.tolist() == [2, 2, 2, 2, 4, 4, 4, 4]


def test_the_map_is_layer_by_module_of_the_last_decision(run: Path) -> None:
    picture = final_map(read_run(run))
    axes = picture.figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q_proj", "v_proj"]
    assert axes.collections[0].get_array().tolist() == [[1, 4], [3, 0]]
    assert [t.get_text() for t in axes.texts] == ["1", "4", "3", "0"]
    assert picture.name == "final_rank" and "step 6" in picture.caption


def test_growth_has_a_panel_a_module_and_each_decision_holds_until_the_next(run: Path) -> None:
    q, v = growth(read_run(run)).figure.axes[:2]
    mesh = q.collections[0]
    assert mesh.get_array().tolist() == [[1, 1], [2, 3]]
    assert v.collections[0].get_array().tolist() == [[1, 4], [1, 0]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [2, 6, 8]


def test_of_800_kinds_of_module_the_first_have_a_panel_and_the_caption_says_so(run: Path) -> None:
    values = {f"tower_{i}.proj": 1 + i % 4 for i in range(800)}
    lines(run / "decisions.jsonl", {"step": 2, "ranks": values, "live": values})
    picture = growth(read_run(run))
    titles = [
        axes.get_title(loc="left") for axes in picture.figure.axes if axes.get_title(loc="left")
    ]
    assert titles == [f"tower_{i}.proj" for i in range(24)]
    assert "One panel for each of the first 24 of 800 kinds of module" in picture.caption
    (axes, _) = final_map(read_run(run)).figure.axes
    assert len(axes.get_xticks()) == 40 and len(axes.texts) == 0
    assert axes.collections[0].get_array().size == 800


def test_names_of_modules_are_as_short_as_tells_them_apart() -> None:
    sites = ["enc.0.att.query", "enc.10.att.query", "enc.0.out.dense", "enc.0.att.dense", "head"]
    layout = layout_of(sites)
    assert layout.modules == ["query", "out.dense", "att.dense", "head"]
    assert layout.layers == [0, 10] and layout.places["enc.10.att.query"] == (1, 0)
    assert np.isnan(layout.grid({"head": 1.0})[1, 3])


def test_a_kill_shows_as_a_job_cut_short_and_the_steps_it_lost(run: Path) -> None:
    run = read_run(run)
    assert [(a.first, a.last, a.ended, a.seconds) for a in run.attempts] == [
        (0, 5, "cut short", None),
        (4, 8, "finished", 90.0),
    ]
    picture = timeline(run)
    bars = [(bar.get_x(), bar.get_width()) for bar in picture.figure.axes[0].patches]
    assert bars == [(0, 5), (4, 4), (4, 1)]
    assert "2 jobs, at least 1 step lost" in picture.caption
    assert [text.get_text().partition(", ")[2] for text in picture.figure.axes[0].texts] == [
        "2 ranks: cut short",
        "4 ranks, 90 s: finished",
    ]


def test_a_kill_between_two_logged_steps_loses_no_step_that_was_saved(run: Path) -> None:
    """As with --log_every 5: killed after step 9, the checkpoint is of 8."""
    resumed = BEGINS | {"step": 8, "reached": 5}
    lines(run / "attempts.jsonl", BEGINS | {"step": 0}, resumed, BEGINS | {"step": 10})
    jobs = read_run(run).attempts
    assert [(job.first, job.last) for job in jobs] == [(0, 8), (8, 10), (10, 10)]


def test_a_run_of_before_attempts_were_written_has_one_job_of_unknown_end(run: Path) -> None:
    (run / "attempts.jsonl").unlink()
    (attempt,) = read_run(run).attempts
    assert (attempt.first, attempt.last, attempt.ended) == (0, 8, "end not recorded")


def stepped(run: RunData, *, of: int) -> RunData:
    """The same of a method that leaves ranks alone, with a checkpoint that knows sizes."""
    full = [row | {"ranks": dict.fromkeys(SITES, 4)} for row in run.decisions]
    sizes = {f"{site}.lora_a": [4, of // 4] for site in SITES}
    manifest = {"sites": {"pieces": dict.fromkeys(SITES)}, "tensors": sizes, "ended": True}
    last = SavedStep(path=run.folder / "step_00000008", manifest=manifest)
    return replace(run, decisions=full, checkpoints=[last])


def test_where_ranks_stay_the_map_is_of_the_share_of_entries_that_are_stepped(run: Path) -> None:
    run = stepped(read_run(run), of=40)
    picture = final_map(run)
    assert picture.name == "final_share" and "are stepped" in picture.caption
    assert picture.figure.axes[0].collections[0].get_array().tolist() == [[0.25, 1], [0.75, 0]]
    assert [t.get_text() for t in picture.figure.axes[0].texts] == ["0.25", "1.00", "0.75", "0.00"]
    assert growth(run).figure.axes[0].collections[0].get_array().tolist() == [
        [0.25, 0.25],
        [0.5, 0.75],
    ]


def test_where_all_is_stepped_to_the_end_a_sentence_stands_for_the_map(run: Path) -> None:
    run = stepped(read_run(run), of=40)
    full = [row | {"live": dict.fromkeys(SITES, 40)} for row in run.decisions]
    section = run_section(replace(run, decisions=full, total_steps=8))
    assert "final_share" not in [picture.name for picture in section.pictures]
    assert "all entries are stepped to the end" in section.absent[0]


def test_one_rank_for_all_that_is_not_the_capacity_is_a_rank(run: Path) -> None:
    run = stepped(read_run(run), of=40)
    assert final_map(replace(run, options={"rank": 8})).name == "final_rank"


def test_a_stage_is_a_point_by_its_lambda_and_one_without_numbers_is_none(run: Path) -> None:
    stage = {"step": 4, "live_ranks": 12, "held_out_loss": 3.5, "lambda": 0.01}
    names = ("live_ranks", "held_out_loss", "lambda")
    without = [stage | {"step": step, name: None} for step, name in enumerate(names, start=5)]
    later = stage | {"step": 8, "live_ranks": 6}
    lines(run / "stages.jsonl", stage, *without, later)
    (axes,) = curves.stages([read_run(run)]).figure.axes
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([12, 6], [3.5, 3.5])
    assert [text.get_text() for text in axes.texts] == ["0.01", "0.01"]
    assert "Rank against quality" in text_of(run)


def test_an_importance_beyond_the_edges_is_counted_at_them() -> None:
    histogram = spread.Histogram()
    histogram.add(np.array([0.0, 1e-30, 1e-24, 1.0, 1e4, 1e9, np.inf], np.float32))
    assert (histogram.zeros, histogram.counts.sum()) == (1, 6)
    assert (histogram.counts[0], histogram.counts[-1]) == (2, 3)


def test_more_runs_than_colours_differ_in_their_dashes(run: Path) -> None:
    run = read_run(run)
    (axes,) = curves.throughput([replace(run, name=f"{i}") for i in range(8)]).figure.axes
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines[::2]]
    assert len({colour for colour, _ in looks}) == 6 and len({*looks}) == 8


def test_peak_memory_says_of_what_it_is_for_every_run(run: Path) -> None:
    run = read_run(run)
    on_gpu = replace(run, environment={"device": "cuda"})
    assert "allocated on its GPU." in curves.memory([on_gpu]).caption
    both = "resident in its process or allocated on its GPU."
    assert both in curves.memory([run, on_gpu]).caption


# The page


def test_the_page_names_no_address_to_load_from(run: Path, page_of_two: str) -> None:
    for page in (page_of_two, text_of(run)):
        loads = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)""", page)
        assert loads and all(a.startswith(("#", "data:")) for pair in loads for a in pair if a)
        assert "<script" not in page and "@import" not in page
        body = page.partition("</style>")[2]
        assert all(colour not in body for colour in (*SERIES, TEXT, FAINT))


def test_several_runs_stand_side_by_side_with_what_differs(
    two_runs: list[Path], page_of_two: str
) -> None:
    (run, other), page = two_runs, page_of_two
    assert "<th>run</th><th>a&lt;b&gt;</th>" in page
    assert "<th>learning_rate</th><td>0.001</td><td>0.002</td>" in page.partition("are the same")[0]
    assert "<th>rank</th><td>4</td><td>4</td>" in page.partition("are the same")[2]
    (axes,) = curves.loss([read_run(run), read_run(other)]).figure.axes
    assert len(axes.lines) == 6 and not (run / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    names = names_of([Path("/x/a/run"), Path("/x/b/run")])
    assert list(names.values()) == ["a/run", "b/run"]
    for again in ("/x/run/", "/x/../x/run"):
        with pytest.raises(UserError, match="given more than once"):
            names_of([Path("/x/run"), Path("/x/other"), Path(again)])


def test_any_name_of_a_run_stands_in_the_legend_as_it_is(run: Path, tmp_path: Path) -> None:
    others = [write_run(tmp_path / name) for name in ("_b", r"$\foo$")]
    found = [read_run(folder) for folder in (run, *others)]
    page = write_page(found, [shared_section(found)])
    assert page.count(">_b</text>") == page.count(r">$\foo$</text>") == 4  # figures of all runs


def test_no_id_stands_twice_in_a_page_and_each_that_is_asked_for_is_there(
    page_of_two: str,
) -> None:
    page = page_of_two
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len({*ids}) > 20
    asked_for = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert {first or second for first, second in asked_for} <= {*ids}


def test_numbers_of_a_logarithmic_axis_are_plain(page_of_real: str) -> None:
    assert "mathdefault" not in page_of_real and ">100</text>" in page_of_real


def test_a_run_that_is_still_going_is_reported_and_said_to_be(run: Path) -> None:
    lines(run / "attempts.jsonl", BEGINS | {"step": 0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # is being written
    hold(run, this_process())
    assert "run is still going:</b> this page shows it as of step 8 of 8" in text_of(run)
    long_ago = time.time() - 60
    os.utime(run / "run.lock", (long_ago, long_ago))
    assert read_run(run).state == "cut short" and "still going" not in text_of(run)


def test_a_resumed_run_that_still_loads_is_going(run: Path) -> None:
    stopped = {"event": "stopped", "step": 6, "time": 1090.0, "why": "SIGTERM"}
    lines(run / "attempts.jsonl", BEGINS | {"step": 0}, stopped)
    hold(run, this_process())
    found = read_run(run)
    assert found.state == "still going" and len(found.attempts) == 2
    assert "still going" in text_of(run)


def test_a_first_job_that_still_loads_is_to_be_waited_for(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    hold(run, this_process())
    with pytest.raises(UserError, match=r"metrics\.jsonl has no record yet\. Wait until"):
        read_run(run)


def test_a_run_that_ended_in_nan_says_so(run: Path) -> None:
    rows = [{"step": s, "loss": loss} for s, loss in enumerate((5.0, None, 4.0, None, None), 1)]
    lines(run / "metrics.jsonl", *rows)
    said = "5.0000 → 4.0000, NaN or infinite from step 4 on"
    assert overview(read_run(run))["training loss"] == said
    lines(run / "metrics.jsonl", {"step": 1, "loss": None})
    assert overview(read_run(run))["training loss"] == "NaN or infinite from step 1 on"


def test_numbers_that_nobody_wrote_down_are_done_without(run: Path) -> None:
    (run / "run.yaml").write_text("rank: null\n")
    (run / "environment.json").write_text('{"world_size": null, "command": null}')
    (run / "attempts.jsonl").unlink()
    assert "<dt>ranks of the job</dt><dd>?</dd>" in text_of(run)


def test_a_run_that_has_only_measured_its_base_is_reported(run: Path) -> None:
    for name in ("decisions.jsonl", "attempts.jsonl"):
        (run / name).unlink()
    lines(run / "metrics.jsonl", {"step": 0, "held_out_loss": 4.5})
    page = text_of(run)
    assert "<dt>held-out loss</dt><dd>4.5000</dd>" in page
    assert "<dt>training loss</dt><dd>–</dd>" in page


def test_a_lock_of_a_process_that_is_gone_is_no_sign_of_life(run: Path) -> None:
    lines(run / "attempts.jsonl", BEGINS | {"step": 0})
    hold(run, replace(this_process(), started=1))
    assert read_run(run).state == "cut short"


def hold(run: Path, process: Process) -> None:
    holder = run_lock.Holder(process=process, job=None, attempt=0, since="", token="")
    (run / run_lock.NAME).write_text(json.dumps(asdict(holder)))


def test_a_method_without_decisions_has_a_sentence_instead_of_a_map(run: Path) -> None:
    (run / "decisions.jsonl").unlink()
    page = text_of(run)
    assert "made no decision" in page and "over time</h3>" not in page


def test_the_same_figures_are_written_as_png(run: Path) -> None:
    page = text_of(run, flags=("--png",))
    files = sorted((run / "report_figures").iterdir())
    assert len(files) == page.count("<figure>") == 7
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert all(GENERATOR.encode() in file.read_bytes()[:1000] for file in files)


@patch("sparse_lora_dist.report.report_command.save_png", save_mark)
def test_figures_of_an_earlier_report_go_and_what_is_not_ours_stays(run: Path) -> None:
    text_of(run, flags=("--png",))
    assert (run / "report_figures" / "final_rank.png").exists()
    others = [run / "report_figures" / name for name in ("mine.png", "notes.txt")]
    for other in others:
        other.write_bytes(b"mine")
    (run / "decisions.jsonl").unlink()
    text_of(run, flags=("--png",))
    assert not (run / "report_figures" / "final_rank.png").exists()
    assert all(other.read_bytes() == b"mine" for other in others)


@patch("sparse_lora_dist.report.report_command.save_png", save_mark)
def test_figures_of_runs_whose_names_are_alike_are_files_of_their_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("x/a_b", "x_a/b", "y/b")]
    page = text_of(*runs, flags=("--png", "--output", str(tmp_path / "page.html")))
    assert len([*(tmp_path / "page_figures").iterdir()]) == page.count("<figure>")


def test_a_file_that_is_no_report_is_not_replaced_and_a_report_is(run: Path) -> None:
    other = run.parent / "mine.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(UserError, match="the folder .* does not exist"):
        text_of(run, flags=("--output", str(run / "none" / "page.html")))
    with pytest.raises(UserError, match=r"mine\.html is not a report"):
        text_of(run, flags=("--output", str(other)))
    assert other.read_text() == "<p>mine</p>"
    text_of(run)
    shutil.copy(run / "report.html", other)
    (run / "environment.json").write_text('{"git_commit": "newer"}')
    assert "newer" in text_of(run, flags=("--output", str(other)))


# Bad input


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda run: (run / "run.yaml").unlink(), r"has no run\.yaml, so it is not a run folder"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text(""), r"metrics\.jsonl has no record yet"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n'),
            r"metrics\.jsonl, line 2 is not valid JSON",
        ),
        (
            lambda run: lines(run / "metrics.jsonl", {"step": 1}, {"step": 2, "loss": [3]}),
            r"metrics\.jsonl, line 2 does not have the fields",
        ),
        (
            lambda run: lines(run / "metrics.jsonl", {"step": 1, "loss": "5.0"}),
            r"metrics\.jsonl, line 1 does not have the fields",
        ),
        (
            lambda run: lines(run / "decisions.jsonl", {"step": 1, "ranks": {"a": 1}}),
            r"decisions\.jsonl, line 1 does not have the fields",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n'),
            r"metrics\.jsonl, line 1 is not valid JSON: NaN is not allowed in JSON",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1e999}\n'),
            r"metrics\.jsonl, line 1 does not have the fields",
        ),
        (
            lambda run: lines(run / "decisions.jsonl", {"step": 1, "ranks": {}, "live": {}}),
            r"decisions\.jsonl, line 1 does not have the fields",
        ),
        (
            lambda run: lines(
                run / "decisions.jsonl",
                decision(2, 1, 1, 1, 1),
                {"step": 4, "ranks": {"a": 1}, "live": {"a": 1}},
            ),
            r"decisions\.jsonl, line 2 lists other sites than line 1",
        ),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), r"metrics\.jsonl cannot be"),
        (lambda run: (run / "environment.json").write_text("["), r"environment\.json cannot be"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_line(run: Path, spoil: Any, said: str) -> None:
    spoil(run)
    with pytest.raises(UserError, match=said):
        read_run(run)


@pytest.mark.usefixtures("processes")
def test_the_program_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launcher/report.py"), str(tmp_path / "none")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


# In a browser, of a real run


@pytest.fixture(scope="module")
def real(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of IncreLoRA on two ranks, stopped after the fourth."""
    folder = tmp_path_factory.mktemp("report") / "real"
    flags = tiny.flags(
        folder, method="increlora", max_steps=8, save_every=2, trackers="tensorboard"
    )
    ranks(2, "tests.work.run:train", flags=[*flags, "--stop_after", "4"])
    ranks(2, "tests.work.run:train", flags=[*flags, "--resume", "auto"])
    return folder


def test_a_real_run_has_its_jobs_memory_gates_and_importance(real: Path) -> None:
    run = read_run(real)
    assert [(a.first, a.last, a.ended, a.world_size) for a in run.attempts] == [
        (0, 4, "stopped by --stop_after", 2),
        (4, 8, "finished", 2),
    ]
    assert [len(s.peaks) for s in run.checkpoints] == [2, 2, 2, 2]
    assert all(peak > 10**7 for s in run.checkpoints for peak in s.peaks)
    lambdas = spread.gate_values(run.checkpoints[-1])
    open_components = sum(run.decisions[-1]["ranks"].values())
    assert len(lambdas) == 4 * len(run.decisions[-1]["ranks"])
    assert (lambdas != 0).sum() == open_components  # reserves end with growth
    early = spread.importances(run.checkpoints[0])
    counted = {kind: int(h.counts.sum()) + h.zeros for kind, h in early.items()}
    assert counted["lora_lambda"] == len(lambdas) and early["lora_a"].counts.sum() > 0


def test_values_on_a_support_are_no_gates(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path / "run", method="shira", max_steps=2)
    ranks(1, "tests.work.run:train", flags=flags)
    assert spread.gates(read_run(tmp_path / "run")) is None


def test_a_damaged_checkpoint_is_named_and_the_rest_is_drawn(real: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(real, tmp_path / "copy")
    (copy / "checkpoints/step_00000008/manifest.json").write_text("{")
    assert "step_00000008/manifest.json is damaged" in text_of(copy)
    assert read_run(copy).checkpoints[-1].peaks == []
    file = copy / "checkpoints/step_00000002/rank_00001.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    page = text_of(copy)
    assert "No distribution of gates: a checkpoint cannot be read" in page
    assert "<h3>Rank over time</h3>" in page


def test_a_checkpoint_that_goes_while_it_is_read_is_no_damage_and_a_copy_is_none(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(real, tmp_path / "copy")
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "step_00000004", checkpoints / "step_00000004_backup")
    listed = saved.published(checkpoints)
    monkeypatch.setattr(saved, "published", lambda folder: listed)
    shutil.rmtree(checkpoints / "step_00000002")
    found = [(s.step, s.damage) for s in read_run(copy).checkpoints]
    assert found == [(4, None), (6, None), (8, None)]


def test_tensorboard_has_ranks_of_every_decision(real: Path) -> None:
    every = {event_accumulator.HISTOGRAMS: 0}
    events = event_accumulator.EventAccumulator(str(real / "tensorboard"), every)
    events.Reload()
    decided = [row["step"] for row in read_records(real / "decisions.jsonl")]
    assert [event.step for event in events.Histograms("sites/ranks")] == decided
    largest = max(max(row["ranks"].values()) for row in read_records(real / "decisions.jsonl"))
    assert events.Histograms("sites/ranks")[-1].histogram_value.max == largest
    assert {"live_entries", "budget", "loss"} <= set(events.Tags()["scalars"])


def test_the_page_in_a_browser_asks_for_nothing_and_fits(page_of_real: str, tmp_path: Path) -> None:
    path = found()
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    (tmp_path / "page.html").write_text(page_of_real)
    grounds = []
    with Browser(path, tmp_path / "profile") as browser:
        for width in (390, 1280):
            for dark in (False, True):
                seen = browser.look(tmp_path / "page.html", width=width, dark=dark)
                assert [r for r in seen.requests if not r.startswith("data:")] == [
                    (tmp_path / "page.html").as_uri()
                ]
                assert seen.complaints == [] and seen.width <= width
                assert len(seen.png) > 50_000
                grounds.append((seen.background, seen.ink))
        assert browser.value("document.querySelectorAll('figure svg').length") == 9
    light, dark_one = grounds[:2]
    assert light == ("rgb(255, 255, 255)", "rgb(31, 35, 40)")
    assert dark_one == ("rgb(13, 17, 23)", "rgb(230, 237, 243)") and grounds[2:] == grounds[:2]
