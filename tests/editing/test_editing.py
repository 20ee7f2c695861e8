"""launcher/edit.py: files of edits, the field's metrics by hand, and whole edits on real ranks."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from sparse_lora_dist.editing.answer_tokens import encode, ids_without_eos
from sparse_lora_dist.editing.edit_command import low_success_hint
from sparse_lora_dist.editing.edit_file import read_edits
from sparse_lora_dist.editing.edit_metrics import COLUMNS, fluency, table_row
from sparse_lora_dist.editing.edit_options import load_request
from sparse_lora_dist.editing.edits import Edit, Question, numbered
from sparse_lora_dist.editing.question_scores import ModelAnswers, score_edits, scored_questions
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request as export_request
from sparse_lora_dist.export.sparse_delta import apply_sparse_delta
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.tiny_tokenizer import byte_tokenizer
from tests.work.edit import FIVE, probe

EDIT, COMPLAINT = "tests.work.edit:edit", "tests.work.edit:complaint"
ROOT = Path(__file__).parents[2]


def written(folder: Path, edits: Any = FIVE, name: str = "edits.json") -> Path:
    (folder / name).write_text(json.dumps(edits, indent=1))
    return folder / name


def flags(tiny: TinyRun, folder: Path, **options: object) -> list[str]:
    """An edit of seconds, by plain LoRA unless another method is named."""
    given: dict[str, object] = {
        "model": tiny.model,
        "edits": folder / "edits.json",
        "output_dir": folder / "run",
        "precision": "fp32",
        "quantization": "none",
        "method": "lora",
        "learning_rate": 1e-2,
        "max_steps": 12,
        "fluency_tokens": 8,
        "sequence_length": 64,
    } | options
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


# --- invariants -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("processes")
def test_one_and_two_ranks_measure_the_same(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    written(tmp_path)
    results = []
    for count in (1, 2):
        own = flags(tiny, tmp_path, output_dir=tmp_path / f"on_{count}", micro_batch_size=2)
        results += ranks(count, EDIT, flags=own)
    one, two, same = results
    assert two["edits"] == same["edits"] == one["edits"]
    assert two["after"] == one["after"] and one["steps"] == two["steps"] == 12
    assert one["after"]["edit success"] > one["before"]["edit success"]
    assert one["after"]["locality"] < 100.0
    assert "all in each step: 3 x 2 rows on each rank\n" in one["said"]
    last = [line for line in one["said"].splitlines() if line.startswith("edited")]
    assert last == [line for line in two["said"].splitlines() if line.startswith("edited")]

    # Stopped on one rank and gone on with on two, it ends the same.
    part = flags(tiny, tmp_path, output_dir=tmp_path / "parts", micro_batch_size=2)
    ranks(1, "tests.work.edit:stopped", flags=[*part, "--stop_after", "5"])
    assert not (tmp_path / "parts" / "edits.json").exists()
    (complaint, _) = ranks(2, COMPLAINT, flags=[*part, "--resume", "auto", "--number", "0:4"])
    assert "was trained on other edits. Give the same --edits and --number" in complaint
    (whole, _) = ranks(2, EDIT, flags=[*part, "--resume", "auto"])
    assert whole["edits"] == one["edits"]


@pytest.mark.usefixtures("processes")
def test_an_adapter_that_does_nothing_leaves_locality_at_100(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    written(tmp_path)
    (said,) = ranks(1, EDIT, flags=flags(tiny, tmp_path, learning_rate=1e-30, max_steps=1))
    assert said["after"]["locality"] == 100.0
    assert said["after"] == said["before"]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("method", ["adalora", "mora"])  # mora has no scale
def test_a_silent_adapter_is_the_base_bit_for_bit(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, method: str
) -> None:
    own = tiny.flags(tmp_path / "run", method=method, max_steps=8)
    assert ranks(1, "tests.work.edit:silent_logits_are_the_bases", flags=own) == [True]


# --- by other means -------------------------------------------------------------------------------


@torch.no_grad()
def predicted_by_transformers(
    model: Any, tokenizer: PreTrainedTokenizerFast, question: Question
) -> tuple[list[int], list[int]]:
    """Predicted tokens of the answer, and its tokens: one text at a time, as EasyEdit does it."""
    ids = tokenizer(f"{question.prompt} {question.answer}").input_ids
    start = len(tokenizer(question.prompt).input_ids)
    choices = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    return choices[start - 1 : -1], ids[start:]


def metrics_by_transformers(
    edits: Sequence[Edit], base: Any, edited: Any, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float | None]:
    questions = scored_questions(edits)
    was, now = (
        [predicted_by_transformers(m, tokenizer, q.question) for q in questions]
        for m in (base, edited)
    )
    after, before = (ModelAnswers(predicted=[p for p, _ in each], texts=()) for each in (now, was))
    return table_row(score_edits(questions, [answer for _, answer in now], after, before))


@pytest.mark.usefixtures("processes")
def test_an_edit_as_a_sparse_delta_measures_the_same_and_is_undone_bit_for_bit(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    edits = read_edits(written(tmp_path)).edits
    own = flags(tiny, tmp_path, method="roselora", roselora_preset="paper", roselora_keep=0.2)
    results, _ = ranks(2, EDIT, flags=own)
    delta = tmp_path / "delta"
    export(export_request([str(tmp_path / "run"), "--output", str(delta), "--format=sparse_delta"]))
    base, edited = (
        AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32) for _ in range(2)
    )
    applied = apply_sparse_delta(edited, delta)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.model)
    got = metrics_by_transformers(edits, base, edited, tokenizer)
    assert got == {**results["after"], "fluency": None}
    assert got["edit success"] > results["before"]["edit success"]
    applied.undo()
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, edited.state_dict()[name]), name


@pytest.mark.usefixtures("processes")
def test_texts_are_those_of_transformers(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    written(tmp_path)
    prompts = ["The dog of Ada is", "Who", "The hat of Bo is a red one"]
    asked = flags(tiny, tmp_path, precision="fp32")
    one, two = ranks(2, "tests.work.edit:said_after", flags=asked, prompts=prompts, num_tokens=9)
    base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.model)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([ids_without_eos(tokenizer, prompt)])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0
            ),
        )
        wanted.append(tokenizer.decode(out[0], skip_special_tokens=True))
    assert one == two == wanted


def test_an_answer_begins_with_the_first_token_that_it_changes_and_has_no_end() -> None:
    plain, framed = byte_tokenizer(), byte_tokenizer(adds_bos=True)
    for tokenizer, before in ((plain, 5), (framed, 6)):
        encoded = encode(tokenizer, Question(prompt="a dog", answer="Rex"))
        assert (encoded.num_prompt, len(encoded.answer)) == (before, 4)
    ends = byte_tokenizer()
    ends._tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ends.eos_token_id)]
    )
    again = encode(ends, Question(prompt="a dog", answer="Rex"))
    assert again == encode(plain, Question(prompt="a dog", answer="Rex"))


def test_what_is_no_run_is_not_replaced(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    written(tmp_path)
    keep = tmp_path / "run" / "adapter" / "mine.txt"
    keep.parent.mkdir(parents=True)
    keep.write_text("kept")
    (said,) = ranks(1, COMPLAINT, flags=[*flags(tiny, tmp_path), "--overwrite"])
    assert "it holds adapter" in said
    assert keep.read_text() == "kept"


def test_an_earlier_run_stays_until_the_new_one_stands(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    written(tmp_path)
    ranks(1, EDIT, flags=flags(tiny, tmp_path))
    before = sorted((tmp_path / "run").rglob("*"))
    short = flags(tiny, tmp_path, sequence_length=8)
    (said,) = ranks(1, COMPLAINT, flags=[*short, "--overwrite"])
    assert "Set --sequence_length" in said
    assert sorted((tmp_path / "run").rglob("*")) == before


# --- by hand --------------------------------------------------------------------------------------

WRONG = 0
RIGHT_OF = {
    "The dog of Ada is": [1, 0, 1],
    "Ada's dog?": [0, 0, 1],
    "What barks at Ada's?": [1, 1, 0],
    "Ada's cat": [1, 1, 0],
    "Ada's car": [0, 0],
    "The hat of Bo is": [1, 1, 1],
    "Bo's hat?": [1, 1, 1],
    "The hat of Bob is": [0, 0, 0],
    "Bo's tie": [1, 0, 0, 0],
    "The sky is": [1, 1, 1, 1],
    "The town of Cy is": [1, 1, 1],
    "Cy's town?": [0, 1, 0],
    "The job of Di is": [0, 0, 0],
    "The age of Eve is": [1, 0],
    "Eve's age?": [1, 1],
    "Next year Eve is": [1, 1],
    "Eve is no longer": [0, 1],
    "Who is 40?": [0, 0, 0],
}
"""At each letter of an answer: is it the first choice? For locality: is it what it was?"""


def test_metrics_of_five_edits_by_hand(tmp_path: Path) -> None:
    questions = scored_questions(read_edits(written(tmp_path)).edits)
    answers = [list(one.question.answer.encode()) for one in questions]
    # Before the edit the model says something else than the answer, which locality does not mind.
    before = [[letter + 1 for letter in answer] for answer in answers]
    predicted = []
    for one, answer, was in zip(questions, answers, before, strict=True):
        right = was if one.column == "locality" else answer
        marks = RIGHT_OF[one.question.prompt]
        predicted.append([r if m else WRONG for r, m in zip(right, marks, strict=True)])
    texts = ["a b a b", "x", "", "one two three", "a a a a a"]
    rows = score_edits(
        questions,
        answers,
        ModelAnswers(predicted=predicted, texts=texts),
        ModelAnswers(predicted=before, texts=()),
    )
    assert [row["edit success"] for row in rows] == pytest.approx([2 / 3, 1, 1, 0, 1 / 2])
    assert [row.get("rephrase") for row in rows] == pytest.approx([1 / 3, 1, 1 / 3, None, 1])
    # Of Eve's kinds one has 1 and 1/2, the other 0: the mean of 3/4 and 0.
    assert [row.get("portability") for row in rows] == pytest.approx([2 / 3, 0, None, None, 3 / 8])
    assert [row.get("locality") for row in rows] == pytest.approx([1 / 3, 5 / 8, None, None, None])
    table = table_row(rows)
    assert table["edit success"] == pytest.approx(100 * (2 / 3 + 1 + 1 + 0 + 1 / 2) / 5)
    assert table["rephrase"] == pytest.approx(100 * (1 / 3 + 1 + 1 / 3 + 1) / 4)
    assert table["portability"] == pytest.approx(100 * (2 / 3 + 0 + 3 / 8) / 3)
    assert table["locality"] == pytest.approx(100 * (1 / 3 + 5 / 8) / 2)
    assert tuple(table) == COLUMNS


@pytest.mark.parametrize("field", ["prompt", "rephrase_prompt"])
def test_a_place_holder_for_the_subject_is_refused(tmp_path: Path, field: str) -> None:
    """As ROME's and CounterFact's own files have it."""
    edit = {"subject": "Rome", "prompt": "the king of Rome is", "target_new": "cat"}
    (tmp_path / "edits.json").write_text(json.dumps([edit | {field: "the king of {} is"}]))
    with pytest.raises(UserError, match=rf":1: edit 1: {field} has the place holder {{}}, as ROME"):
        read_edits(tmp_path / "edits.json")


def test_fluency_by_hand() -> None:
    # Bigrams ab, ba, ab: 0.918296 bits. Trigrams aba, bab: 1 bit.
    assert fluency("a b a b") == pytest.approx((2 / 3 * 0.918296 + 4 / 3) / 2, abs=1e-6)
    # Four words apart, and a full stop is one: 3 bigrams, 2 trigrams, all different.
    assert fluency("so it goes.") == pytest.approx((2 / 3 * 1.584963 + 4 / 3) / 2, abs=1e-6)
    assert fluency("a a a a") == fluency("a") == fluency("") == 0.0


# --- files ----------------------------------------------------------------------------------------


def test_all_forms_are_read(tmp_path: Path) -> None:
    file = read_edits(written(tmp_path))
    assert file.report() == (
        "5 edits; 4 rephrased; locality Forgetfulness 1; locality Relation_Specificity 3; "
        "portability Logical_Generalization 1; portability Reasoning 3; "
        "portability Subject_Aliasing 1; 1 question left out (no answer); "
        "fields that are not used: cond, ground_truth"
    )
    assert file.edits[1].locality["Forgetfulness"] == (
        Question(prompt="The sky is", answer="blue"),
    )
    lines = tmp_path / "edits.jsonl"
    lines.write_text("\n".join(map(json.dumps, FIVE)) + "\n")
    assert read_edits(lines) == file
    other = {"concept": "Ada", "text": "Ada is", "labels": "a pilot", "rephrase": "Who is Ada?"}
    (edit,) = read_edits(written(tmp_path, [other], "bio.json")).edits
    assert edit.rephrased == Question(prompt="Who is Ada?", answer="a pilot")


@pytest.mark.parametrize(
    ("number", "subjects"),
    [(None, "Ada Bo Cy Di Eve"), ("2", "Cy"), ("1:3", "Bo Cy"), ("3:", "Di Eve"), (":1", "Ada")],
)
def test_number_names_edits(tmp_path: Path, number: str | None, subjects: str) -> None:
    edits = read_edits(written(tmp_path)).edits
    assert " ".join(e.subject for e in numbered(edits, number, "it")) == subjects


def test_all_problems_of_a_file_are_told_by_line_and_field(tmp_path: Path) -> None:
    bad: list[Any] = [
        {k: v for k, v in FIVE[0].items() if k != "target_new"},
        FIVE[1]
        | {"prompt": " ", "locality": {"Kind": [{"prompt": "no answer"}, probe(None, "x")]}},
        FIVE[2],
        FIVE[3] | {"target_new": 7, "portability": {"Kind": [probe("fine", "yes"), probe(3, "x")]}},
        "no object",
    ]
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, bad)))
    with pytest.raises(UserError) as error:
        read_edits(path)
    told = str(error.value)
    for said in (
        "has 7 problems",
        f"{path}:1: edit 1: target_new is missing or null",
        f"{path}:2: edit 2: prompt is blank",
        f"{path}:2: edit 2: locality.Kind[0].ground_truth is missing",
        f"{path}:2: edit 2: locality.Kind[1].prompt is null, but must be text",
        f"{path}:4: edit 4: target_new must be text, got int: 7",
        f"{path}:4: edit 4: portability.Kind[1].prompt must be text, got int: 3",
        f"{path}:5: edit 5: the edit must be an object, got str",
        "target_new or labels",
    ):
        assert said in told
    listed = written(tmp_path, bad)
    line = 1 + listed.read_text().splitlines().index(' "no object"')
    with pytest.raises(UserError, match=f":{line}: edit 5: the edit must be an object"):
        read_edits(listed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"prompt": "a",\n "b": }]', ":2 is not valid JSON"),
        ('{"prompt": "a"}\nno json', ":2 is not valid JSON"),
        ("[]", "has no edits"),
        ("", "has no edits"),
        ('[{"src": "a", "alt": "b"}]', "subject is missing"),
        ('{"data": [1]}', "KnowEdit's format"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "edits.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_edits(tmp_path / "edits.json")


# --- the command line -----------------------------------------------------------------------------


def test_defaults_are_the_released_ones_where_none_is_given(tmp_path: Path, tiny: TinyRun) -> None:
    written(tmp_path)
    asked = ["--edits", str(tmp_path / "edits.json"), "--micro_batch_size", "2"]
    request = load_request([*asked, "--rank", "4"])
    config, rule = request.config, request.config.method_options
    assert (config.adapter.method, rule.roselora_preset, rule.roselora_keep) == (
        "roselora",
        "released",
        0.05,
    )
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (4, 32.0, 0.1)
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert (config.train.learning_rate, config.train.max_steps) == (5e-4, 25)
    assert config.train.gradient_accumulation_steps == 3  # 5 edits, 2 a micro-batch
    assert "or set --roselora_preset paper: the released preset clamps" in low_success_hint(config)
    lora = load_request([*asked, "--method", "lora"]).config
    assert lora.adapter.method == "lora"
    assert low_success_hint(lora).endswith(
        "Raise --max_steps above 25 or --learning_rate above 0.0005"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], ["edits is missing"]),
        (
            ["--edits", "no.json", "--number", "x"],
            ["no.json does not exist", "number must be like"],
        ),
        (["--number", "5"], ["--number 5 does not select", "has 5 edits, numbered from 0 to 4"]),
        (["--number", "3:3"], ["from 0 to 4"]),
        (
            ["--packing", "true", "--eval_data", "default"],
            ["packing cannot be used for edits", "eval_data cannot be used"],
        ),
        (["--max_steps", "null"], ["max_steps must be a number"]),
        (["--overwrite", "--resume", "auto"], ["Leave one of them out"]),
        (["--init_adapter", "."], ["init_adapter cannot be used for edits"]),
        (["--modules_to_save", "norm"], ["would not undo"]),
    ],
)
def test_bad_options_are_told(tmp_path: Path, given: list[str], said: list[str]) -> None:
    path = ["--edits", str(written(tmp_path))] if given and "--edits" not in given else []
    with pytest.raises(UserError) as error:
        load_request([*path, *given])
    for words in said:
        assert words in str(error.value)


@pytest.mark.usefixtures("processes", "full")
def test_only_read_counts_and_a_bad_file_ends_with_2(tmp_path: Path) -> None:
    def said(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launcher/edit.py", "--only_read", "--edits", str(path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    good, bad = said(written(tmp_path)), said(written(tmp_path, [{}], "bad.json"))
    assert good.returncode == 0 and good.stdout.startswith("5 edits; 4 rephrased; ")
    assert bad.returncode == 2 and "bad.json:2: edit 1: subject is missing" in bad.stderr


@pytest.mark.usefixtures("processes")
def test_an_earlier_run_is_replaced_with_overwrite_only(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    written(tmp_path)
    own = flags(tiny, tmp_path, max_steps=2, fluency_tokens=0, number="1:3")
    (first,) = ranks(1, EDIT, flags=own)
    assert [e["subject"] for e in first["edits"]] == ["Bo", "Cy"]
    assert first["after"]["fluency"] is None
    results = (tmp_path / "run" / "edits.json").read_bytes()
    with pytest.raises(AssertionError, match="already holds a run"):
        ranks(1, EDIT, flags=own)
    assert (tmp_path / "run" / "edits.json").read_bytes() == results
    (again,) = ranks(1, EDIT, flags=[*own, "--overwrite", "true", "--number", "4"])
    assert [e["subject"] for e in again["edits"]] == ["Eve"]
    checkpoints = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert len(checkpoints) == 1
