"""The HTML page, parsed: structure, figures, nothing from elsewhere; its template in a wheel."""

import base64
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.evals.report import Group, make_groups
from lim_sglang.evals.report_page import make_page
from lim_sglang.evals.tables import (
    METHOD,
    condition_table,
    disagreement_table,
    group_table,
    percent,
    sentence,
)
from tests.evals.summaries import FULL, five_runs, simulated

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br", "img"}
"""Tags without an end."""


class Page(HTMLParser):
    """Elements with their attributes, texts by tag, and tables as rows of texts by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
            self.tables.setdefault(attributes["class"], []).append(self.rows)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def runs() -> list[Any]:
    return [*five_runs(40), *five_runs(30, task="aime24", samples=8)]


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    return make_groups(runs())


@pytest.fixture(scope="module")
def text(groups: tuple[Group, ...]) -> str:
    return make_page(groups)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_loaded_from_elsewhere(page: Page, text: str) -> None:
    assert not page.open  # every element is closed
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert all(link.startswith("#") for link in page.attributes("href"))
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.attributes("src"))
    assert not re.findall(r"@import|@font-face|url\(|\w+://", text)
    assert any("default-src 'none'" in each for each in page.attributes("content"))


def test_the_page_is_accessible(page: Page, groups: tuple[Group, ...]) -> None:
    assert page.elements[0] == ("html", {"lang": "en"})
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    referred = [name for each in page.attributes("aria-labelledby") for name in each.split()]
    assert {*referred, *(link[1:] for link in page.attributes("href"))} <= set(ids)
    assert {attributes.get("scope") for tag, attributes in page.elements if tag == "th"} == {
        "col",
        "row",
    }
    assert all(caption.strip() for caption in page.texts["caption"])
    assert len(page.texts["caption"]) == len(page.texts["table"]) == 6
    assert all(page.attributes("alt"))
    assert len(page.attributes("alt")) == len(page.texts["figcaption"]) == 8
    for group in groups:
        assert group.title in page.texts["title"][0]
        assert group.title in page.texts["h2"]


def test_pictures_are_svg_files(page: Page) -> None:
    for link in page.attributes("src"):
        root = ElementTree.fromstring(base64.b64decode(link.partition(",")[2]))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_tables_and_sentences_are_those_of_the_runs(page: Page, groups: tuple[Group, ...]) -> None:
    expected = {
        "scores": [group_table(group, in_page=True) for group in groups],
        "disagreements": [disagreement_table(group.rows) for group in groups],
        "conditions": [condition_table(group) for group in groups],
    }
    for name, tables in expected.items():
        rows = [[list(row) for row in (table.head, *table.rows)] for table in tables]
        assert page.tables[name] == rows, name
    items = [" ".join(item.split()) for item in page.texts["li"]]
    for row in (row for group in groups for row in group.rows):
        assert any(item.startswith(f"{row.name} {percent(row.accuracy)} %") for item in items)
        assert not row.against_full or sentence(row.against_full) in items
    assert METHOD in page.texts["p"]


def test_a_wrong_figure_in_the_page_is_found(text: str, groups: tuple[Group, ...]) -> None:
    right = group_table(groups[1]).rows[3][1]
    wrong = f"{float(right[:4]) + 0.1:.1f}{right[4:]}"
    planted = Page(text.replace(f"<td>{right}</td>", f"<td>{wrong}</td>"))
    assert planted.tables["scores"][1] != Page(text).tables["scores"][1]


def test_runs_that_differ_in_more_than_their_policy_have_a_note() -> None:
    runs = [simulated(questions=9, **FULL), simulated(questions=9, dtype="fp8")]
    (note,) = (item for item in Page(make_page(make_groups(runs))).texts["li"] if "also" in item)
    assert note == "full and LessIsMore 256 also differ in dtype: 'bfloat16' and 'fp8'."


def test_names_from_files_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>\"'&"
    names = {"model": evil, "task": evil, "device_name": evil}
    summaries = [
        replace(run, questions=(replace(run.questions[0], question_id=evil, correct=(right,) * 4),))
        for run, right in (
            (simulated(questions=1, **names), True),
            (simulated(questions=1, **{**names, **FULL}), False),
        )
    ]
    text = make_page(make_groups(summaries))
    assert "<script" not in text
    page = Page(text)
    assert page.tables["disagreements"][0][1] == [evil, "0 of 4", "4 of 4"]


def test_the_same_runs_give_the_same_page_in_any_order() -> None:
    two = [simulated(questions=9), simulated(questions=9, **FULL)]
    assert make_page(make_groups(two)) == make_page(make_groups(two[::-1]))


def test_one_run_alone_is_a_page_too() -> None:
    page = Page(make_page(make_groups([simulated(questions=1, samples=1)])))
    assert set(page.tables) == {"scores", "conditions"}
    assert "What the data say" not in page.texts["h3"]
    assert "nav" not in page.texts


def test_a_page_is_made_from_the_wheel_alone(tmp_path: Path) -> None:
    """The template is no Python file: `pyproject.toml` has to name it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("lim_sglang", "kernels", "programs", "evals"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tree / built.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    program = (
        "from lim_sglang.evals import report_page; assert 'installed' in report_page.__file__; "
        "print(report_page.make_page([])[:15])"
    )
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "installed", capture_output=True, text=True
    )
    assert made.stdout.strip() == "<!DOCTYPE html>", made.stderr
