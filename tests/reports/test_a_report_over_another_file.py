"""A report written over a file of the user's, an edited report, or a link."""

from pathlib import Path

import pytest

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report.page import GENERATOR, MARK, is_own_page, seal
from sparse_lora_dist.report.report_command import check_output

PAGE = f"<!DOCTYPE html>\n<head>\n{MARK}<title>ä</title>\n</head>\n<p>loss</p>\r\n"


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_a_report_as_it_was_written_is_replaced(tmp_path: Path) -> None:
    page = seal(PAGE)
    assert page != PAGE and page.count("sha256") == 1
    check_output(written(tmp_path / "report.html", page))


def test_a_report_of_a_version_before_is_replaced_by_its_generator_line(tmp_path: Path) -> None:
    check_output(written(tmp_path / "report.html", PAGE))


@pytest.mark.parametrize(
    "text",
    [
        seal(PAGE).replace("loss", "loss, see my remark"),
        seal(PAGE) + "<!-- mine -->",
        seal(PAGE).replace("\r\n", "\n"),
        f"My notes on the {GENERATOR} of last week",
        f"<p>{GENERATOR}</p>",
        "",
    ],
)
def test_an_edited_report_or_a_file_of_mine_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    file = written(tmp_path / "report.html", text)
    with pytest.raises(UserError, match=r"report\.html is not a report of this program, or was"):
        check_output(file)
    assert file.read_bytes() == text.encode()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_refused_and_stays(tmp_path: Path, there: bool) -> None:
    link, target = tmp_path / "report.html", tmp_path / "elsewhere.html"
    link.symlink_to(target)
    if there:
        written(target, seal(PAGE))
    with pytest.raises(UserError, match=r"report\.html is a link"):
        check_output(link)
    assert link.is_symlink()


def test_letters_that_are_no_utf_8_are_no_report() -> None:
    assert not is_own_page(b"\xff\xfe" + MARK.encode("utf-16"))
