"""Sections that commands write into documents."""

from pathlib import Path

import pytest

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.markdown_section import MarkdownSection, join_words, markdown_table, short_commit

SECTION = MarkdownSection("lim report")
BEGIN, END = "<!-- lim report: begin -->", "<!-- lim report: end -->"


def test_only_the_text_between_the_markers_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"# Title\n\n{BEGIN}\n| old |\n{END}\n\nmore | text |\n")
    changed = SECTION.replace_in(document, "| new |")
    assert changed == f"# Title\n\n{BEGIN}\n| new |\n{END}\n\nmore | text |\n"
    assert SECTION.replace(changed, "| new |", "README.md") == changed
    assert SECTION.extract(changed, "README.md") == "| new |"


@pytest.mark.parametrize(
    "text",
    ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{END}", f"{BEGIN}\n{BEGIN}\n{END}"],
)
def test_missing_repeated_and_swapped_markers_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=f"README.md needs one line {BEGIN}"):
        SECTION.replace(text, "| new |", "README.md")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read \S+none\.md \(No such file or directory\)"):
        SECTION.replace_in(tmp_path / "none.md", "")


def test_a_bar_in_a_cell_ends_no_cell() -> None:
    assert markdown_table(("a|b",), [("|x|",)]).splitlines()[::2] == [r"| a\|b |", r"| \|x\| |"]


def test_a_table_has_one_line_a_row() -> None:
    assert markdown_table(["name", "n"], [["a", "1"], ["b", "2"]]).splitlines() == [
        "| name | n |",
        "| --- | ---: |",
        "| a | 1 |",
        "| b | 2 |",
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (join_words("a"), "a"),
        (join_words("ab"), "a and b"),
        (join_words("abc"), "a, b and c"),
        (short_commit(None), "unknown"),
        (short_commit("1be6cc2"), "1be6cc2"),
        (short_commit("0123456789abcdef+d61e"), "0123456789 with local edits d61e"),
    ],
)
def test_lists_and_commits_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected
