"""Users had answers that can be read in two ways: labels or indices, and numbers that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.examples import Table
from sparse_lora_dist.evaluation.right_answers import final_number, reference_number
from tests.fixtures.data_files import jsonl, pairs

TEXTS = ["x", "y", "z", "w"]


def right(folder: Path, answers: list[Any], choices: Any) -> list[int]:
    """Write examples with the same choices; the index of the right choice of each."""
    rows = [{"prompt": "Which?", "choices": choices, "answer": answer} for answer in answers]
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table.read(str(path), DataConfig(), None)
    return table.map(lambda table, record: table.choices(record)[1])


def labelled(*labels: Any) -> dict[str, Any]:
    return {"text": TEXTS[: max(2, len(labels))], "label": list(labels)}


@pytest.mark.parametrize(
    ("answers", "labels", "places"),
    [
        ([0, 1, 2, 3], "1234", [0, 1, 2, 3]),
        (["0", "1", "2", "3"], "1234", [0, 1, 2, 3]),
        ([1, 2, 3, 4], "1234", [0, 1, 2, 3]),
        (["1", "2"], "1234", [0, 1]),
        (["B", "A"], "BACD", [0, 1]),
        (["B", 0], "ABCD", [1, 0]),
        (["A", "y"], "ABCD", [0, 1]),
        ([0, 3], "ABCD", [0, 3]),
    ],
)
def test_all_answers_of_a_file_are_labels_or_none_is(
    tmp_path: Path, answers: list[Any], labels: str, places: list[int]
) -> None:
    assert right(tmp_path, answers, labelled(*labels)) == places


@pytest.mark.parametrize(
    ("answers", "labels", "said"),
    [
        (
            [1, 2],
            "1234",
            r"q\.jsonl:1: All answers are whole numbers that are labels .*and indices",
        ),
        (["1", "y"], "1234", r"q\.jsonl:2: The answer is no label .* at .*q\.jsonl:1 is one"),
        ([0, "B"], "BACD", r"q\.jsonl:1: The answer is no label .* at .*q\.jsonl:2 is one"),
        (["1", 9], "1234", r"q\.jsonl:2: 'answer' is 9, which matches none"),
    ],
)
def test_answers_that_may_be_labels_or_not_are_refused(
    tmp_path: Path, answers: list[Any], labels: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        right(tmp_path, answers, labelled(*labels))


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (labelled("A", "A"), "'choices' has the label 'A' twice"),
        (labelled("A"), r"'choices' has 2 texts, but the labels \['A'\]"),
        (labelled("A", "B", "C") | {"text": TEXTS[:2]}, "'choices' has 2 texts, but the labels"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused_with_their_line(
    tmp_path: Path, choices: Any, said: str
) -> None:
    with pytest.raises(UserError, match=rf"q\.jsonl:1: {said}"):
        right(tmp_path, ["A"], choices)


def test_a_text_that_stands_twice_is_right_in_both_places(tmp_path: Path) -> None:
    """MMLU has such questions. Both are equally likely, and the first one is taken."""
    assert right(tmp_path, [1, 2], ["x", "x", "y"]) == [0, 2]


NOT_PLAIN = """1/2|10:30|1e3|1e+3|2^10|1 000|1'000|1.000.000|1,00|3k|2 million|1½|√2|2π|3 - 1|3*4
1 / 2|16-3|5/x""".replace("\n", "|").split("|")
LATEX = r"""\boxed{\frac{1}{2}} \boxed{2^{10}} $\sqrt{5}$ \boxed{2\pi} \boxed{1\,000} \frac{\pi}{2}
1\frac{1}{2} 5\cdot10^{3} -\frac{3}{4} -\boxed{5} 0.\overline{3} 0.\bar3 12_{8} 3\frac12 5\sqrt{2}
\binom{5}{2} 2\pi \log_25 \ln(5) \boxed{(3,4)} \boxed{x+5} \boxed{x-5} \boxed{5-x} \boxed{x>5}
\boxed{\{1\}} 90^\circ x_1 \boxed{2\text{~million}} \frac{a}{5} sqrt(5) x+5 5+x""".split()
PLAIN_LATEX = r"""18 \boxed{18} $\boxed{18}$. $18$ \(18\) \boxed{\$18} \boxed{18\%}
\boxed{\text{18}} \boxed{18\text{~cm}} \textbf{18} x_{1}=18 \frac{36}{2}=18 \textbf{It~is:}~18
\approx~18 \Rightarrow~18 \boxed{x=18} 2\times9=\boxed{18}
\begin{aligned}x&=18\end{aligned}""".split()
PLAIN = "18|1,234|1,234,567.50|$5|-3|-$5|.5|18.|50%|18 apples|**18**|€5".split("|")


@pytest.mark.parametrize("text", NOT_PLAIN)
def test_numbers_that_are_not_plain_are_no_right_answers(text: str) -> None:
    for answer in (text, f"#### {text}", f"so 1 + 1 = 2\n#### {text}\n"):
        assert final_number(answer) is not None and reference_number(answer) is None


@pytest.mark.parametrize("text", LATEX)
def test_a_piece_of_a_formula_of_latex_is_no_right_answer(text: str) -> None:
    for answer in (text, f"#### {text}", f"so 1 + 1 = 2\n#### {text}\n", f"It is {text}."):
        assert reference_number(answer) is None


@pytest.mark.parametrize("text", PLAIN_LATEX)
def test_a_plain_number_in_latex_is_a_right_answer(text: str) -> None:
    assert reference_number(text) == reference_number(f"In 2024 it is {text}") == 18


def test_a_thousand_of_latex_is_one_number() -> None:
    for text in (r"\boxed{1{,}000}", r"$1,\!000$", r"#### 1{,}000"):
        assert reference_number(text) == final_number(text) == 1000


def test_a_number_after_the_box_is_no_right_answer() -> None:
    assert reference_number(r"$\boxed{18}$, as step 3 says") is None


def test_two_numbers_after_the_mark_are_no_right_answer() -> None:
    assert reference_number("#### between 3 and 4") is None


@pytest.mark.parametrize("text", PLAIN)
def test_plain_numbers_are_right_answers(text: str) -> None:
    before = "In 2024. Step 3: 2 * 9 = 18, so it is"
    for answer in (text, f"{before} {text}", f"2*9={text}", f"{before}\n#### {text}\nby 7"):
        assert reference_number(answer) == final_number(answer) is not None


def test_a_choice_task_without_its_column_names_the_columns(tmp_path: Path) -> None:
    table = Table.read(str(jsonl(tmp_path / "a.jsonl", pairs("b"))), DataConfig(), None)
    with pytest.raises(UserError, match=r"no column 'choices', which .* are: prompt, response\."):
        table.choices(next(iter(table.examples)))
