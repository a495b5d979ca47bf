"""The HTML page, parsed: structure, figures, nothing from elsewhere; its template in a wheel."""

import base64
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest

from lim_sglang.evals.matrix import MATRICES
from lim_sglang.evals.report import Group, make_groups
from lim_sglang.evals.report_page import make_page
from lim_sglang.evals.tables import (
    METHOD,
    Table,
    condition_table,
    disagreement_table,
    group_table,
    percent,
    sentence,
)
from tests.evals.summaries import FULL, five_runs, simulated

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script>\"'&"
"""A name that must not become markup."""


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    names = {"task": EVIL, "model": EVIL, "device_name": EVIL}
    return make_groups([*five_runs(40), simulated(**{**names, **FULL}), simulated(**names)])


@pytest.fixture(scope="module")
def page(groups: tuple[Group, ...]) -> Element:
    """The parsed page: every element is closed."""
    return ElementTree.fromstring(make_page(groups))


def texts(root: Element, tag: str) -> list[str]:
    """Return the texts of elements with single spaces."""
    return [" ".join("".join(each.itertext()).split()) for each in root.iter(tag)]


def attributes(root: Element, name: str) -> list[str]:
    return [value for each in root.iter() if (value := each.get(name)) is not None]


def tables(root: Element, name: str) -> list[list[list[str]]]:
    """Return the rows of all tables of a class."""
    found = root.iter("table")
    return [
        [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
        for table in found
        if table.get("class") == name
    ]


def test_nothing_is_loaded_from_elsewhere_or_run(page: Element) -> None:
    tags = {each.tag for each in page.iter()}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert all(link.startswith("#") for link in attributes(page, "href"))
    text = ElementTree.tostring(page, encoding="unicode")
    assert not re.findall(r"@import|@font-face|url\(|\w+://", text)
    assert any("default-src 'none'" in each for each in attributes(page, "content"))
    pictures = [link.split("data:image/svg+xml;base64,")[1] for link in attributes(page, "src")]
    roots = [ElementTree.fromstring(base64.b64decode(picture)) for picture in pictures]
    assert [root.tag for root in roots] == ["{http://www.w3.org/2000/svg}svg"] * 8


def test_the_page_is_accessible(page: Element, groups: tuple[Group, ...]) -> None:
    assert page.get("lang") == "en"
    ids = attributes(page, "id")
    assert len(ids) == len(set(ids))
    referred = [name for each in attributes(page, "aria-labelledby") for name in each.split()]
    assert {*referred, *(link[1:] for link in attributes(page, "href"))} <= set(ids)
    assert set(attributes(page, "scope")) == {"col", "row"}
    assert len(texts(page, "table")) == len(list(filter(None, texts(page, "caption")))) == 6
    assert len(attributes(page, "alt")) == len(texts(page, "figcaption")) == 8
    assert [group.title for group in groups] == texts(page, "h2")


def shown(found: Sequence[Table]) -> list[list[list[str]]]:
    """Return tables as the page shows them: the space before a percent sign does not break."""
    heads = [[title.replace(" %", "\N{NO-BREAK SPACE}%") for title in each.head] for each in found]
    return [[head, *map(list, each.rows)] for head, each in zip(heads, found, strict=True)]


def test_tables_and_sentences_are_those_of_the_runs(
    page: Element, groups: tuple[Group, ...]
) -> None:
    assert tables(page, "scores") == shown([group_table(group, in_page=True) for group in groups])
    disagreements = shown([disagreement_table(group.rows) for group in groups])
    assert tables(page, "disagreements") == disagreements
    assert tables(page, "conditions") == shown([condition_table(group) for group in groups])
    items = texts(page, "li")
    for row in (row for group in groups for row in group.rows):
        assert any(item.startswith(f"{row.name} {percent(row.accuracy)} %") for item in items)
        assert not row.against_full or sentence(row.against_full) in items
    assert METHOD in texts(page, "p")


def test_one_run_alone_and_other_differences() -> None:
    alone = make_page(make_groups([simulated(questions=1, samples=1)]))
    assert not tables(ElementTree.fromstring(alone), "disagreements")
    assert "What the data say" not in alone
    page = ElementTree.fromstring(
        make_page(make_groups([simulated(**FULL), simulated(dtype="fp8")]))
    )
    (note,) = (item for item in texts(page, "li") if "also differ" in item)
    assert note == "full and LessIsMore 256 also differ in dtype: 'auto' and 'fp8'."


def test_a_wheel_has_all_that_a_page_and_a_matrix_need(tmp_path: Path) -> None:
    """Templates and matrices are no Python files: `pyproject.toml` has to name them."""
    tree, installed = tmp_path / "tree", tmp_path / "installed"
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
        wheel.extractall(installed)
    program = (
        "from lim_sglang.evals import report_page; assert 'installed' in report_page.__file__; "
        "print(report_page.make_page([])[:15])"
    )
    command = [sys.executable, "-c", program]
    made = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    assert made.stdout.strip() == "<!DOCTYPE html>", made.stderr
    for path in MATRICES.glob("*.toml"):
        inside = installed / "lim_sglang" / "evals" / "matrices" / path.name
        assert inside.read_bytes() == path.read_bytes()
