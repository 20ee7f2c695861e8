"""Evaluation: the same numbers on any number of ranks, training's loss, PEFT's, transformers'
answers; what is counted as right; and what is refused."""

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from sparse_lora_dist.errors import ConfigError
from sparse_lora_dist.evaluation.eval_metrics import METRICS
from sparse_lora_dist.evaluation.eval_options import METRICS as NAMES
from sparse_lora_dist.evaluation.eval_options import load_request
from sparse_lora_dist.evaluation.examples import index_of_answer
from sparse_lora_dist.evaluation.intervals import paired, ratio, wilson
from sparse_lora_dist.evaluation.results import as_text
from sparse_lora_dist.evaluation.right_answers import (
    chosen_index,
    final_number,
    is_exact,
    is_same_number,
)
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request as export_request
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.reference import documents_of, loss_of_documents, whole_model
from tests.fixtures.tiny_run import TinyRun

WORK = "tests.work.eval"
EVALUATE, REFUSAL = f"{WORK}:evaluate", f"{WORK}:refusal"
QUESTIONS: list[dict[str, Any]] = [
    {"question": "the cat", "choices": ["sat", "ran far away"], "answer": 1},
    {"question": "a dog ran", "choices": ["in", "on the hill", "by"], "answer": "B"},
    {"question": "an old", "choices": ["tree", "house"], "answer": "tree"},
    {"question": "red", "choices": ["hill", "dog and cat", "a", "b"], "answer": "3"},
    {"question": "saw the hill", "choices": ["far", "away"], "answer": "A"},
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(tiny: TinyRun, **options: object) -> list[str]:
    given = {
        "model": tiny.model,
        "eval_data": tiny.held_out,
        "precision": "fp32",
        "sequence_length": 64,
        "batch_size": 2,
        "max_new_tokens": 6,
    } | options
    return [word for k, v in given.items() for word in (f"--{k}", str(v))]


def numbers(output: Path, place: int = 0) -> dict[str, Any]:
    return dict(json.loads(output.read_text())["results"][place]["measures"])


@pytest.fixture(scope="module")
def run(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained a head in full beside its adapter."""
    folder = tmp_path_factory.mktemp("run")
    options = {"modules_to_save": "lm_head", "eval_batches": 9, "alpha": 5.0}
    ranks(2, "tests.work.run:train", flags=tiny.flags(folder, **options))
    return folder


@pytest.fixture(scope="module")
def odd(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's own adapter, of other ranks and alphas in some modules."""
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\..*q_proj": 3},
        use_rslora=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(whole_model(tiny.model, quantization="nf4"), settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("odd")
    model.save_pretrained(str(folder))
    return folder


def theirs(tiny: TinyRun, adapter: Path | None) -> PreTrainedModel:
    """transformers and PEFT, in one process."""
    model = whole_model(tiny.model, quantization="nf4")
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


def loss_of(tiny: TinyRun, model: PreTrainedModel) -> float:
    return loss_of_documents(model, documents_of(tiny.held_out, tiny.model))


def test_one_and_three_ranks_give_the_same_file(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "questions.jsonl", QUESTIONS)
    screens = {}
    for count in (1, 3):
        asked = {"metrics": "choice,choice_generated", "eval_data": data, "compare": f"base,{run}"}
        ranks(count, EVALUATE, flags=flags(tiny, **asked, output=tmp_path / f"choice{count}.json"))
        asked = {"metrics": "loss,exact", "adapter": run, "output": tmp_path / f"loss{count}.json"}
        out = ranks(count, EVALUATE, flags=flags(tiny, **asked))
        screens[count] = out[0].splitlines()[-5:-1]  # the last names the file
    for name in ("choice", "loss"):
        one, three = (tmp_path / f"{name}{count}.json" for count in (1, 3))
        assert one.read_bytes() == three.read_bytes()
    assert screens[1] == screens[3]
    assert numbers(tmp_path / "choice1.json").keys() == {
        "choice",
        "choice_per_token",
        "choice_generated",
    }


def test_the_loss_is_the_runs_own_and_peft_s(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    ranks(2, EVALUATE, flags=flags(tiny, compare=f"base,{run}", output=output))
    before, *_, after = read_records(run / "metrics.jsonl")
    for place, row, adapter in ((0, before, None), (1, after, run / "adapter")):
        found = numbers(output, place)
        assert found["loss"]["value"] == pytest.approx(row["held_out_loss"], rel=1e-6)
        assert found["loss"]["value"] == pytest.approx(
            loss_of(tiny, theirs(tiny, adapter)), rel=1e-5
        )
        assert found["perplexity"]["value"] == math.exp(found["loss"]["value"])
        assert found["loss"]["low"] < found["loss"]["value"] < found["loss"]["high"]
        assert found["loss"]["examples"] == 6
    (difference,) = json.loads(output.read_text())["differences"]
    fell = difference["measures"]["loss"]
    assert fell["value"] == pytest.approx(
        after["held_out_loss"] - before["held_out_loss"], rel=1e-4
    )
    assert fell["high"] < 0.0


def test_every_module_has_its_own_rank_and_scale(
    ranks: Ranks, tiny: TinyRun, odd: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    said, _ = ranks(2, EVALUATE, flags=flags(tiny, adapter=odd, output=output))
    wanted = loss_of(tiny, theirs(tiny, odd))
    assert abs(wanted - loss_of(tiny, theirs(tiny, None))) > 1e-2
    assert numbers(output)["loss"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert "it has no tensors of" not in said


def test_modules_whose_tensors_are_lost_are_told_of(
    ranks: Ranks, tiny: TinyRun, odd: Path, tmp_path: Path
) -> None:
    """PEFT says it with a warning; here it was silent."""
    part, output = shutil.copytree(odd, tmp_path / "part"), tmp_path / "results.json"
    file = part / "adapter_model.safetensors"
    kept = {k: t for k, t in load_file(file).items() if "layers.1.mlp" not in k}
    save_file(kept, file, {"format": "pt"})
    (said,) = ranks(1, EVALUATE, flags=flags(tiny, adapter=part, output=output))
    assert "it has no tensors of 1 linear (model.layers.1.mlp.down_proj), which" in said
    with pytest.warns(UserWarning, match="missing adapter keys"):
        wanted = loss_of(tiny, theirs(tiny, part))
    assert numbers(output)["loss"]["value"] == pytest.approx(wanted, rel=1e-5)


def test_a_merged_model_is_the_adapter_on_its_base(
    ranks: Ranks, tiny: TinyRun, odd: Path, tmp_path: Path
) -> None:
    base = whole_model(tiny.model, quantization="none")
    merged = peft.PeftModel.from_pretrained(base, str(odd)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny.model / name, tmp_path / "merged")
    plain: dict[str, object] = {"quantization": "none"}
    ranks(2, EVALUATE, flags=flags(tiny, **plain, adapter=odd, output=tmp_path / "a.json"))
    plain["model"] = tmp_path / "merged"
    ranks(2, EVALUATE, flags=flags(tiny, **plain, output=tmp_path / "b.json"))
    loss, again = (numbers(tmp_path / f"{name}.json")["loss"]["value"] for name in "ab")
    assert loss == pytest.approx(again, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_transformers_and_ranks_forward_alike(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path, batch_size: int
) -> None:
    # Four rows of a batch are padded on the left to one length. Two batches, or six, on three
    # ranks and four: some have none in the last round.
    model = theirs(tiny, run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    prompts = [json.loads(line)["prompt"] for line in tiny.held_out.read_text().splitlines()]
    wanted = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, eos_token_id=[end, tokenizer.eos_token_id]
        )
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        wanted.append(tokenizer.decode(ids, skip_special_tokens=True))
    answers, count = tmp_path / "answers.jsonl", 4 if batch_size == 1 else 3
    asked = {"metrics": "exact", "adapter": run, "max_new_tokens": 24, "batch_size": batch_size}
    found = ranks(count, f"{WORK}:said", flags=flags(tiny, **asked, answers=answers))
    assert [texts for texts, _ in found] == [wanted] * count
    assert len({forwards for _, forwards in found}) == 1
    assert len({len(text) for text in wanted}) > 1, "answers of different lengths"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(row["example"], row["said"]) for row in rows] == list(enumerate(wanted))


def test_choices_are_taken_by_likelihood(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    model, answers = theirs(tiny, run / "adapter"), tmp_path / "answers.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    summed, per_token = [], []
    for question in QUESTIONS:
        sums, means = [], []
        for choice in question["choices"]:
            chat: list[dict[str, str]] = [{"role": "user", "content": question["question"]}]
            before = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            chat.append({"role": "assistant", "content": choice})
            ids = torch.tensor([tokenizer.apply_chat_template(chat)["input_ids"]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(before) - 1 : -1]
            each = torch.nn.functional.cross_entropy(
                logits.float(), ids[0, len(before) :], reduction="none"
            )
            sums.append(float(each.sum()))
            means.append(float(each.mean()))
        summed.append(min(range(len(sums)), key=sums.__getitem__))
        per_token.append(min(range(len(means)), key=means.__getitem__))
    rights = [1, 1, 0, 3, 0]
    asked = {"metrics": "choice", "eval_data": write(tmp_path / "q.jsonl", QUESTIONS)}
    ranks(2, EVALUATE, flags=flags(tiny, **asked, adapter=run, answers=answers))
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    for name, taken in (("choice", summed), ("choice_per_token", per_token)):
        own = [row["value"] for row in rows if row["measure"] == name]
        assert own == [float(a == b) for a, b in zip(taken, rights, strict=True)]
    assert 0 < sum(row["value"] for row in rows) < len(rows), "some are right, some are not"


def test_a_run_s_config_evaluates_its_adapter_and_not_what_it_began_with(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    later, output = tmp_path / "later", tmp_path / "results.json"
    begun = {"init_adapter": run / "adapter", "modules_to_save": "lm_head", "alpha": 5.0}
    ranks(2, "tests.work.run:train", flags=tiny.flags(later, **begun, eval_batches=9))
    own = ["--config", str(later / "run.yaml"), "--eval_data", str(tiny.held_out)]
    own += ["--compare", f"{later},{run},base", "--output", str(output)]
    ranks(2, EVALUATE, flags=own)
    losses = [numbers(output, place)["loss"]["value"] for place in range(3)]
    last = [read_records(folder / "metrics.jsonl")[-1]["held_out_loss"] for folder in (later, run)]
    assert losses[:2] == pytest.approx(last, rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-4 < abs(losses[2] - losses[1])


def test_an_export_of_one_rank_is_evaluated_with_what_was_trained_in_full(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    uniform, output = tmp_path / "uniform", tmp_path / "results.json"
    export(export_request([str(run), "--output", str(uniform), "--uniform_rank"]))
    assert (uniform / "modules_to_save.safetensors").exists()
    ranks(2, EVALUATE, flags=flags(tiny, compare=f"{run},{uniform}", output=output))
    one, two = (numbers(output, place)["loss"]["value"] for place in (0, 1))
    assert two == pytest.approx(one, rel=1e-6)


def test_a_run_trained_otherwise_is_told_of(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    asked = flags(tiny, adapter=run, quantization="none", limit=2)
    (said,) = ranks(1, EVALUATE, flags=asked)
    assert (
        "note      the adapter was trained with --quantization nf4, but is evaluated with none\n"
        in said
    )
    assert f"note      use --config {run}/run.yaml to evaluate it with" in said


def test_a_loss_that_is_no_number_ends_it(
    ranks: Ranks, tiny: TinyRun, run: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(run / "adapter", tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    save_file({k: t * math.nan for k, t in load_file(file).items()}, file, {"format": "pt"})
    one, two = ranks(2, f"{WORK}:complaint", flags=flags(tiny, adapter=broken))
    assert one == two and one.startswith("Metric loss: the loss of 6 of 6 texts is not finite")


def test_a_model_that_was_compared_is_freed_before_the_next_is_loaded(
    ranks: Ranks, tiny: TinyRun, odd: Path
) -> None:
    asked = flags(tiny, compare=f"base,{odd},base", limit=2)
    assert ranks(1, f"{WORK}:shares_alive", flags=asked) == [[0, 0, 0]]


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("file", ["zero3_offload", "zero3_hpz"])
def test_other_engines_compare_the_same(
    ranks: Ranks, tiny: TinyRun, odd: Path, tmp_path: Path, file: str
) -> None:
    engine = Path("ds_configs", f"{file}.json").read_text()
    engine = engine.replace('"zero_hpz_partition_size": 8', '"zero_hpz_partition_size": 2')
    (tmp_path / "engine.json").write_text(engine)
    asked = {"metrics": "loss,exact", "compare": f"base,{odd},base", "limit": 4}
    for name, more in (("usual", {}), ("other", {"ds_config": tmp_path / "engine.json"})):
        ranks(4, EVALUATE, flags=flags(tiny, **asked, **more, output=tmp_path / f"{name}.json"))
    usual, other = (tmp_path / f"{name}.json" for name in ("usual", "other"))
    assert other.read_bytes() == usual.read_bytes()


@pytest.mark.parametrize("how", ["interrupted", "unwritten"])
def test_what_is_cut_short_leaves_nothing_half_written(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, how: str
) -> None:
    output = tmp_path / "results.json"
    earlier = '{"results": [], "differences": []}'
    output.write_text(earlier)
    asked = {"metrics": "loss,exact", "output": output, "overwrite": "true", "limit": 4}
    (end,) = ranks(1, f"{WORK}:{how}", flags=flags(tiny, **asked))
    unwritten = "UserError: An error occurred while writing"
    assert end.startswith("KeyboardInterrupt" if how == "interrupted" else unwritten)
    assert output.read_text() == earlier
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so 3 + 4 = 7\n#### 7 apples, not 9", "7"),
        ("#### 5\n#### 6", "6"),
        ("It costs $1,234.50.", "1234.5"),
        ("16-3-4=9", "9"),
        ("he lost: -5", "-5"),
        ("#### -1,000", "-1000"),
        ("#### $.5", "0.5"),
        ("in 2 of 3.", "3"),
        ("#### 18.00", "18"),
        ("x2 and room2b", None),
        ("#### none, but 5 before? no", "5"),
        ("3 ####", None),
        ("so _18_ then", "18"),
        ("#### –5", "-5"),  # noqa: RUF001  a dash
        ("1,2345", "2345"),
        ("", None),
    ],
)
def test_final_numbers(text: str, number: str | None) -> None:
    found = final_number(text)
    assert (found is None) == (number is None)
    assert number is None or is_same_number(text, number)
    assert not is_same_number(text, "123456")


CHOICES = ["A dog", "a cat", "the cat on a hill", "dog"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a dog, I think", 0),
        ("  A CAT\n", 1),
        ("C", 2),
        ("(b) because", 1),
        ("d. no", 3),
        ("It is the cat on a hill", 2),
        ("Certainly a cat or a dog", 1),
        ("doggy", None),
        ("E.", None),
        ("The answer is B", 1),
        ("Answer: (C)", 2),
        ("**B**", 1),
        ("B is right", 1),
        ("I, personally, think a cat", 1),
        ("no option", None),
        ("", None),
        ("ANSWER IS (B).", 1),
        ("THE ANSWER IS A CAT", 1),
        ("C IS RIGHT", 2),
        (r"\boxed{B}", 1),
        (r"$\boxed{\text{B}}$", 1),
        ("The answer is $B$", 1),
        (r"The answer is \(C\)", 2),
        (r"Answer: $\mathbf{B}$", 1),
        ("The answer is 'B'", 1),
        ("Option A is incorrect. The answer is B.", 1),
        ("Option A is incorrect.", None),
        ("B is wrong, so the answer is C", 2),
        ("[B]", 1),
        ("The correct answer is d.", 3),
        ("The answer is C#", None),
    ],
)
def test_which_choice_a_text_takes(text: str, place: int | None) -> None:
    assert chosen_index(text, CHOICES) == place


@pytest.mark.parametrize(
    ("text", "choices", "place"),
    [
        ("e\u0301", ["e", "\xe9"], 1),
        ("it is E\u0301", ["e", "\xe9"], 1),
        ("The answer is \xe9", ["e", "e\u0301"], 1),
        ("The answer is E\u0301.", ["v", "w", "x", "y", "z"], None),
        ("x\u0302", ["x", "y"], None),
        ("\u0915\u092e\u0940", ["\u0915\u092e", "y"], None),
        ("\u2764\ufe0f, yes", ["y", "\u2764"], 1),
    ],
    ids=ascii,
)
def test_a_letter_with_an_accent_is_another_letter(
    text: str, choices: list[str], place: int | None
) -> None:
    """However it is written: U+00E9, or e and U+0301. Vowels of Hindi are such marks too."""
    assert chosen_index(text, choices) == place


def test_a_number_is_not_taken_for_another() -> None:
    assert chosen_index("-5", ["sat", "3", "5"]) is None
    assert chosen_index("3.5", ["sat", "3", "5"]) is None
    assert chosen_index("it is 3.", ["sat", "3", "5"]) == 1


@pytest.mark.parametrize(
    ("answer", "labels", "place"),
    [
        (" Paris", (), 0),
        (1, (), 1),
        ("1", (), 1),
        ("B", (), 1),
        (1, ["1", "2", "3"], 0),
        ("2", [1, 2, 3], 1),
        ("same", (), 2),
    ],
)
def test_which_choice_is_right(answer: object, labels: Sequence[object], place: int) -> None:
    assert index_of_answer(answer, [" Paris", " Rome", "same", "same"], labels, "'answer'") == place


def test_exact_is_but_for_case_and_white_space() -> None:
    assert is_exact(" The  Answer\n", "the answer")
    assert not is_exact("the answer.", "the answer")


def test_intervals_are_those_of_a_calculator() -> None:
    # 7 of 10: centre (0.7 + 1.92073 / 10) / 1.384146, half 1.959964 * 0.174939 / 1.384146.
    assert wilson(7, 10) == pytest.approx((0.396778, 0.892209), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    ends = [interval for n in range(1, 300) for interval in (wilson(0, n), wilson(n, n))]
    assert all(interval and 0.0 <= interval[0] < interval[1] <= 1.0 for interval in ends)
    low, high = ratio([1.0, 2.0, 3.0, 6.0], [1.0] * 4) or (0.0, 0.0)
    # Mean 3, standard deviation sqrt(14 / 3), of the mean half of it.
    assert (low, high) == pytest.approx(
        (3 - 1.959964 * 1.080123, 3 + 1.959964 * 1.080123), abs=1e-5
    )
    assert ratio([3.0, 3.0], [1.5, 1.5]) == (2.0, 2.0)
    assert ratio([1.0], [1.0]) is None
    # 6 of 6 weights: r = 1.5; residuals 1 - 1.5 * 2, 2 - 1.5, 6 - 4.5: squares 4, 0.25, 2.25.
    low, high = ratio([1.0, 2.0, 6.0], [2.0, 1.0, 3.0]) or (0.0, 0.0)
    half = 1.959964 * math.sqrt(3 / 2 * 6.5) / 6
    assert (low, high) == pytest.approx((1.5 - half, 1.5 + half), abs=1e-6)
    # 3 gained, 1 lost of 10: (3.5 - 1.5) / 12, half 1.959964 sqrt(5 - 12 / 36) / 12.
    ours, theirs = [1.0] * 5 + [0.0] * 5, [0.0] * 3 + [1.0] * 3 + [0.0] * 4
    middle, half = 2 / 12, 1.959964 * math.sqrt(5 - 1 / 3) / 12
    assert paired(ours, theirs) == pytest.approx((middle - half, middle + half), abs=1e-6)
    low, high = paired(ours, ours) or (0.0, 0.0)
    assert low < -0.1 < 0.1 < high, "no disagreement among ten is not certainty"


def test_the_table_has_a_line_for_every_number() -> None:
    number = {"value": 0.5, "low": 0.25, "high": 0.75, "examples": 1200}
    alone = number | {"low": None, "high": None}
    content = {
        "results": [{"adapter": "base", "measures": {"exact": number, "loss": alone}}],
        "differences": [{"adapter": "a", "from": "base", "measures": {"exact": number}}],
    }
    assert as_text(content).splitlines() == [
        "adapter   measure  value    95% interval        examples",
        "base      exact    0.5000   0.2500 to 0.7500    1,200",
        "base      loss     0.5000                       1,200",
        "a - base  exact    +0.5000  +0.2500 to +0.7500  1,200",
    ]


def test_the_command_line_knows_the_metrics_there_are() -> None:
    assert tuple(METRICS) == NAMES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": "loss,gsmk8"}, "got 'gsmk8'; did you mean gsm8k?"),
        ({"adapter": "./nowhere"}, "--adapter ./nowhere does not exist, and is not a hub id"),
        ({"compare": "base,./nowhere"}, "--compare ./nowhere does not exist, and is not a hub id"),
        ({"chat_template": "nowhere.jinja"}, "--chat_template nowhere.jinja does not exist"),
        ({"answers": "."}, "answers must be a file, got the folder"),
        ({"eval_data": "./nowhere.jsonl"}, "--eval_data ./nowhere.jsonl does not exist"),
        ({"adapter": "a", "compare": "b,base"}, "--adapter and --compare are both given"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"task": "seq_cls"}, "task must be causal_lm for launcher/eval.py"),
        ({"output": "."}, "output must be a file, got the folder"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_wrong_options_are_refused(tiny: TinyRun, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_request(flags(tiny, **options))
    assert said in str(refused.value)
    assert len(refused.value.problems) == 1


def test_all_wrong_options_are_told_of_at_once(tiny: TinyRun) -> None:
    wrong = {"metrics": "gsmk8", "task": "seq_cls", "eval_data": "./no.jsonl", "batch_size": 0}
    with pytest.raises(ConfigError) as refused:
        load_request(flags(tiny, **wrong))
    assert len(refused.value.problems) == 4


def test_a_file_is_replaced_only_when_that_is_asked(tiny: TinyRun, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    output.write_text('{"results": [], "differences": []}')
    with pytest.raises(ConfigError, match="Give --overwrite"):
        load_request(flags(tiny, output=output))
    load_request(flags(tiny, output=output, overwrite="true"))


def test_a_faulty_example_is_named_by_line_and_field(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    good: dict[str, Any] = {"question": "the cat", "choices": ["sat", "ran"], "answer": "A"}
    for bad, metric, said in [
        ({"answer": None}, "exact", "'answer' is missing or null"),
        ({"question": None}, "exact", "'question' is missing or null"),
        (
            {"answer": "C"},
            "choice",
            "'answer' is 'C', which matches none of the example's 2 choices",
        ),
        ({"choices": ["sat"]}, "choice", "'choices' must be a list of at least two"),
        ({"answer": "two"}, "gsm8k", "The example's answer has no number: 'two'"),
        ({"question": "far " * 30}, "exact", "more than --sequence_length 64"),
    ]:
        first = good | ({"answer": "2"} if metric == "gsm8k" else {})
        write(data, [first, good | bad])
        (message,) = ranks(1, REFUSAL, flags=flags(tiny, eval_data=data, metrics=metric))
        assert message.startswith(f"{data}:2: ")
        assert said in message
    long = "far " * 20
    write(data, [good | {"question": long + "a" * i} for i in range(9)])
    (message,) = ranks(1, REFUSAL, flags=flags(tiny, eval_data=data, metrics="exact"))
    *lines, more, last = message.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{data}:{n}" for n in range(1, 6)]
    assert more == "and 4 more examples like these" and last.endswith("to keep the longest.")
    enough = last.split()[2]
    ranks(1, EVALUATE, flags=flags(tiny, eval_data=data, metrics="exact", sequence_length=enough))
    write(data, [{"prompt": "the cat", "why": "because"}])
    (message,) = ranks(1, REFUSAL, flags=flags(tiny, eval_data=data, metrics="gsm8k"))
    assert message == (
        f"--eval_data {data} has no column 'response' or 'answer'. Its columns are: prompt, why. "
        "Give the column of the response with --response_field."
    )
    write(data, [{"messages": [{"role": "user", "content": "the cat"}, "sat"]}])
    (message,) = ranks(1, REFUSAL, flags=flags(tiny, eval_data=data, metrics="exact"))
    assert "must be" in message and "Traceback" not in message


def test_an_adapter_that_does_not_fit_is_refused(
    ranks: Ranks, tiny: TinyRun, odd: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"

    def message(adapter: Path) -> str:
        first, second = ranks(2, REFUSAL, flags=flags(tiny, adapter=adapter, output=output))
        assert first == second
        return str(first)

    assert "has no adapter_config.json" in message(tiny.model)
    unexported = tmp_path / "unexported"
    unexported.mkdir()
    (unexported / "run.yaml").write_text("method: lora\n")
    assert f"launcher/export.py {unexported} --output" in message(unexported)
    two = flags(tiny, compare=f"{tiny.model},{unexported}")
    (both,) = ranks(1, REFUSAL, flags=two)
    assert "has no adapter_config.json" in both and "launcher/export.py" in both

    def other(name: str, change: Any, **config: object) -> Path:
        folder = shutil.copytree(odd, tmp_path / name)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(change(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    wider = other("wider", lambda w: {k: torch.cat([t, t], 1) for k, t in w.items()})
    assert "does not fit --model: " in message(wider)
    assert "but the model needs" in message(wider)
    deeper = other("deeper", lambda w: {k.replace("layers.1", "layers.9"): t for k, t in w.items()})
    assert "the model has no linear named model.layers.9" in message(deeper)
    dora = other("dora", lambda w: w, use_dora=True)
    assert "is not a plain LoRA adapter: its adapter_config.json has use_dora" in message(dora)
    half = other(
        "half", lambda w: {k: t for k, t in w.items() if "layers.1.mlp" not in k or "_A" in k}
    )
    assert "has only one of lora_A and lora_B" in message(half)
    head = {"base_model.model.other_head.weight": torch.zeros(2, 2)}
    assert "No module is called other_head" in message(other("head", lambda w: w | head))
    assert not output.exists()
