"""The HTML page, parsed: structure, figures, nothing from elsewhere. In a
browser: no sideways scroll.
"""

import base64
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest

from lim_sglang.evals.metrics import Summary
from lim_sglang.evals.report import Group, leave_out_repeats, make_groups
from lim_sglang.evals.report_page import make_page
from lim_sglang.evals.run_store import AskedQuestion
from lim_sglang.evals.sections import METHOD
from lim_sglang.evals.tables import (
    Table,
    condition_table,
    disagreement_table,
    group_table,
    percent,
    question_table,
    sentence,
)
from lim_sglang.programs.schema import SampleState
from tests.evals.summaries import FULL, five_runs, question, run, simulated

ROOT = Path(__file__).parents[2]
LONG_FORMULA = r"\frac{1}{2}" * 60
EVIL = "<script>alert(1)</script>\"'&"
"""A name that must not become markup."""


CUT_OFF = run(
    *(question(f"q{n}", [None], states={0: SampleState.TRUNCATED}) for n in range(20)),
    policy="lessismore",
    budget=256,
    samples=4,
)
"""A run of which no sample ended by itself."""


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    names = {"task": EVIL, "model": EVIL, "device_name": EVIL}
    runs = [simulated(questions=40, **{**names, **FULL}), simulated(questions=40, **names)]
    conditions = [{**each.conditions, "questions": EVIL} for each in runs]
    two = [replace(run, conditions=each) for run, each in zip(runs, conditions, strict=True)]
    return make_groups([*map(_with_all_columns, five_runs(40)), *two])


def _with_all_columns(run: Summary) -> Summary:
    """Return a run whose prompts were counted and whose samples were timed."""
    known = [
        replace(each, prompt_tokens=80, seconds=tuple(tokens / 50 for tokens in each.tokens))
        for each in run.questions
    ]
    return replace(run, questions=tuple(known))


@pytest.fixture(scope="module")
def asked(groups: tuple[Group, ...]) -> dict[str, dict[str, AskedQuestion]]:
    """Texts and reference answers of the second group's questions, except for one text."""
    text = f"What is\n{EVIL} in {'x' * 300} and {LONG_FORMULA}?"
    names = [each.question_id for each in groups[0].rows[0].summary.questions]
    known = {name: AskedQuestion(f"{EVIL} {LONG_FORMULA}", text) for name in names}
    return {EVIL: {**known, names[0]: AskedQuestion("17", None)}}


@pytest.fixture(scope="module")
def html(groups: tuple[Group, ...], asked: dict[str, dict[str, AskedQuestion]]) -> str:
    return make_page(groups, asked)


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    """The parsed page: every element is closed."""
    return ElementTree.fromstring(html)


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
    assert len(texts(page, "table")) == len(list(filter(None, texts(page, "caption")))) == 8
    assert len(attributes(page, "alt")) == len(texts(page, "figcaption")) == 8
    assert [group.title for group in groups] == texts(page, "h2")


def shown(found: Sequence[Table]) -> list[list[list[str]]]:
    """Return tables as the page shows them: percent signs and intervals do not break."""
    space = "\N{NO-BREAK SPACE}"
    return [
        [
            [title.replace(" %", f"{space}%") for title in each.head],
            *([n, *(c.replace(" to ", f"{space}to{space}") for c in row)] for n, *row in each.rows),
        ]
        for each in found
    ]


def test_tables_and_sentences_are_those_of_the_runs(
    page: Element, groups: tuple[Group, ...]
) -> None:
    assert tables(page, "scores") == shown([group_table(group) for group in groups])
    bare = groups[1]  # the group whose questions are not known
    assert tables(page, "questions disagreements")[1:] == shown([disagreement_table(bare.rows)])
    assert tables(page, "questions")[1:] == shown([question_table(bare.rows)])
    assert tables(page, "conditions") == shown([condition_table(group) for group in groups])
    items = texts(page, "li")
    for row in (row for group in groups for row in group.rows):
        assert any(item.startswith(f"{row.name} {percent(row.accuracy)} %") for item in items)
        assert not row.against_full or sentence(row.against_full) in items
    assert METHOD in texts(page, "p")


def test_each_number_has_its_question_and_reference_answer(
    page: Element, groups: tuple[Group, ...], asked: dict[str, dict[str, AskedQuestion]]
) -> None:
    expected = {row[0]: list(row[1:]) for row in question_table(groups[0].rows).rows}
    head, *found = tables(page, "questions")[0]
    assert head == ["question id", "reference answer", *(row.name for row in groups[0].rows)]
    assert len(found) == len(expected) == 40
    for name, gold, *cells in found:
        (stored,) = (q for i, q in asked[EVIL].items() if name.split("\n")[0].startswith(i))
        assert gold == stored.gold
        assert name.endswith(stored.text or "q000")
        assert cells == expected[name[:4]]


@pytest.mark.parametrize(
    ("runs", "sentences"),
    [
        ([simulated(questions=40, **FULL)], ["No plot of accuracy over budget: no run has a b"]),
        ([simulated(questions=40, samples=1)], ["votes split: every", "over tokens: every"]),
        ([CUT_OFF], ["No plot of lengths of samples: no sample ended by itself"]),
    ],
)
def test_no_plot_stands_where_there_are_no_data(runs: list[Summary], sentences: list[str]) -> None:
    page = ElementTree.fromstring(make_page(make_groups(runs)))
    assert len(texts(page, "figure")) == 4 - len(sentences)
    for expected in sentences:
        assert any(expected in each for each in texts(page, "p"))


def test_runs_that_read_everything_say_so_in_tiles_and_sentences() -> None:
    runs = [simulated(questions=40, **FULL), simulated(questions=40, budget=4096)]
    questions = [tuple(replace(each, prompt_tokens=50) for each in run.questions) for run in runs]
    runs = [replace(run, questions=each) for run, each in zip(runs, questions, strict=True)]
    items = texts(ElementTree.fromstring(make_page(make_groups(runs))), "li")
    assert "read everything 0 of 160 past the budget" in items[1]
    assert "points" not in items[1]
    assert "the comparison says nothing about sparse attention" in items[2]


MEASURE = """<iframe id="f" style="width:{width}px;height:4000px;border:0" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const inside = frame.contentDocument;
  for (const each of inside.querySelectorAll("details")) each.open = true;
  const root = inside.documentElement, wide = [];
  for (const each of inside.querySelectorAll("body, body *")) {{
    const scrolls = each.scrollWidth > each.clientWidth + 1 && each.clientWidth > 1;
    const outside = each.getBoundingClientRect().right > {width} + 1;
    if (scrolls || outside) wide.push(each.tagName + "." + each.className);
  }}
  document.body.insertAdjacentHTML("beforeend", "<output>" + root.clientWidth + " "
    + root.scrollWidth + " " + wide.slice(0, 5) + "</output>");
}};
</script>"""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_scrolls_sideways(width: int, html: str, tmp_path: Path) -> None:
    """The page stands in a frame of that width with all its parts open; a script beside the frame,
    since the page allows none, looks for elements wider than their places.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} on the PATH")
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.format(width=width, page=escape(html, quote=True)), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    command += ["--window-size=1400,4000", "--dump-dom", outer.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r"<output>(.*?)</output>", shown.stdout)
    assert found.strip() == f"{width} {width}", shown.stderr


def test_one_run_alone_and_other_differences() -> None:
    alone = make_page(make_groups([simulated(questions=1, samples=1)]))
    assert not tables(ElementTree.fromstring(alone), "questions disagreements")
    assert "What the data say" not in alone
    assert "not complete" not in alone
    cut = make_page(make_groups([simulated(questions=1, samples=1, asked=2)]))
    assert "LessIsMore 256: 1 of 2 samples: the run is not complete" in cut
    assert alone.count("No plots: 1 question is too few") == 1
    assert "<img" not in alone
    page = ElementTree.fromstring(
        make_page(make_groups([simulated(**FULL), simulated(dtype="fp8")]))
    )
    (note,) = (item for item in texts(page, "li") if "also differ" in item)
    assert note == "full and LessIsMore 256 also differ in dtype: 'auto' and 'fp8'."


def test_a_run_that_is_left_out_as_a_repeat_is_named_in_its_section_by_no_path() -> None:
    first, other = simulated(questions=20), simulated(questions=20, model="other")
    twin = replace(first, run_id="twin", source="/some/folder/twin", questions=first.questions[:-1])
    kept, repeats = leave_out_repeats([twin, first, other, simulated(questions=20, **FULL)])
    (note,) = (repeat.sentence() for repeat in repeats)
    assert note == f"left out: /some/folder/twin has the same conditions as {first.label}"
    page = make_page(make_groups(kept), repeats=repeats)
    assert "/home/me" not in page
    sections = list(ElementTree.fromstring(page).iter("section"))
    notes = [[text for text in texts(each, "p") if "left out" in text] for each in sections]
    name = "LessIsMore 256"
    assert sorted(notes) == [[], [f"left out: twin has the same conditions as {name}"]]
