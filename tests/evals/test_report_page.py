"""The page, read again as a browser reads it: structure, figures, nothing from elsewhere."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from lim_sglang.evals.report import Group, make_groups
from lim_sglang.evals.report_page import all_conditions, make_page
from lim_sglang.evals.tables import METHOD, NONE, columns, contested
from tests.evals.made_summaries import FULL, five_runs, made

VOID = {"meta", "br"}
"""Tags that have no end."""


class Page(HTMLParser):
    """Elements with their attributes, and tables as rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.tables: list[dict[str, Any]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append({"class": dict(attrs).get("class"), "caption": "", "rows": []})
        elif tag == "tr":
            self.tables[-1]["rows"].append([])
        elif tag in ("th", "td"):
            self.tables[-1]["rows"][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1]["rows"][-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")
        if "caption" in self.open:
            self.tables[-1]["caption"] += data

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


def test_tags_are_closed_where_they_belong(page: Page) -> None:
    assert not page.open


def test_nothing_comes_from_elsewhere(page: Page, text: str) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
    links = [*page.attributes("href"), *page.attributes("src"), *page.attributes("srcset")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.findall(r"@import|@font-face|url\((?!#)", text)
    assert set(re.findall(r"\w+://[^\"'\s<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert any("default-src 'none'" in each for each in page.attributes("content"))


def test_a_reader_knows_language_width_and_title(page: Page, groups: tuple[Group, ...]) -> None:
    assert page.elements[0] == ("html", {"lang": "en"})
    assert "width=device-width, initial-scale=1" in page.attributes("content")
    for group in groups:
        assert group.title in page.texts["title"][0]
        assert group.title in page.texts["h2"]


def test_ids_are_unique_and_everything_that_is_referred_to_is_there(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    referred = [name for each in page.attributes("aria-labelledby") for name in each.split()]
    referred += [link.removeprefix("#") for link in page.attributes("href")]
    referred += re.findall(r"url\(#([^)]+)\)", " ".join(page.attributes("clip-path")))
    assert set(referred) <= set(ids)


def test_every_table_has_a_caption_and_headers_and_scrolls_in_its_own_box(page: Page) -> None:
    assert len(page.tables) == 6
    for table in page.tables:
        assert table["caption"].strip()
        assert len({len(row) for row in table["rows"][:1]}) == 1
    scopes = [attributes.get("scope") for tag, attributes in page.elements if tag == "th"]
    assert set(scopes) == {"col", "row"}
    for number, (tag, _) in enumerate(page.elements):
        if tag == "table":
            around = page.elements[number - 1]
            assert around[0] == "div"
            assert around[1]["class"] == "scroll"
            assert (around[1]["role"], around[1]["tabindex"]) == ("region", "0")


def test_every_picture_says_what_it_is(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 8
    assert all(each["role"] == "img" and each["aria-labelledby"] for each in pictures)
    assert len(page.texts["figcaption"]) == 8
    assert len(page.texts["desc"]) == 8


def score_rows(page: Page) -> list[list[list[str]]]:
    """Of each table of scores, the rows under the header."""
    return [table["rows"][1:] for table in page.tables if table["class"] == "scores"]


def expected_rows(groups: tuple[Group, ...]) -> list[list[list[str]]]:
    return [
        [[row.name, *(column.cell(row) for column in columns(group))] for row in group.rows]
        for group in groups
    ]


def test_the_figures_are_the_scores(page: Page, groups: tuple[Group, ...]) -> None:
    assert score_rows(page) == expected_rows(groups)


def test_a_wrong_figure_in_the_page_is_found(text: str, groups: tuple[Group, ...]) -> None:
    right = columns(groups[1])[0].cell(groups[1].rows[3])
    wrong = f"{float(right[:4]) + 0.1:.1f}{right[4:]}"
    at = text.rindex(f"<td>{right}</td>")
    planted = text[:at] + text[at:].replace(right, wrong, 1)
    assert score_rows(Page(planted)) != expected_rows(groups)


def test_tiles_and_sentences_are_those_of_the_runs(page: Page, groups: tuple[Group, ...]) -> None:
    items = [" ".join(item.split()) for item in page.texts["li"]]
    for group in groups:
        for row in group.rows:
            value, error = row.score.pass_at_1.value, row.score.pass_at_1.error
            head = f"{row.name} {100 * value:.1f} ± {100 * (error or 0):.1f} % pass@1"
            assert any(item.startswith(head) for item in items)
            assert not row.against_full or row.against_full.sentence in items
    assert METHOD in page.texts["p"]


def test_contested_questions_are_listed_by_id_with_counts(
    page: Page, groups: tuple[Group, ...]
) -> None:
    shown = [table["rows"][1:] for table in page.tables if table["class"] == "contested"]
    assert shown == [
        [[question.question_id, *question.counts] for question in contested(group.rows)]
        for group in groups
    ]


def test_all_conditions_are_there_and_shared_ones_stand_once(
    page: Page, groups: tuple[Group, ...]
) -> None:
    tables = [table["rows"] for table in page.tables if table["class"] == "conditions"]
    for rows, group in zip(tables, groups, strict=True):
        found = {row[0]: row[1:] for row in rows[1:]}
        for row in group.rows:
            assert set(row.conditions) - {"versions"} <= set(found)
        assert found["versions.torch"] == ["2.11.0"]
        assert found["max_tokens"] == ["2,048"]
        assert found["budget"] == [NONE, "1,024", "512", "256", "128"]
        assert found["select_layers"] == [NONE, *["2, 14"] * 4]
        assert [[c.name, *c.values] for c in all_conditions(group)] == rows[1:]


def test_runs_that_differ_in_more_than_their_policy_say_so() -> None:
    page = Page(make_page(make_groups([made(questions=9, **FULL), made(questions=9, dtype="fp8")])))
    (note,) = (item for item in page.texts["li"] if "also differ" in item)
    assert note == "full and LessIsMore 256 also differ in dtype: 'bfloat16' and 'fp8'."


def test_names_from_files_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>\"'&"
    run = made(questions=9, model=evil, task=evil, device_name=evil)
    first = replace(run.questions[0], question_id=evil, correct=(True,) * 4)
    other = made(questions=9, model=evil, task=evil, **FULL)
    second = replace(other.questions[0], question_id=evil, correct=(False,) * 4)
    summaries = [
        replace(run, questions=(first, *run.questions[1:])),
        replace(other, questions=(second, *other.questions[1:])),
    ]
    text = make_page(make_groups(summaries))
    page = Page(text)
    assert "<script" not in text
    assert not {tag for tag, _ in page.elements} & {"script"}
    assert any(evil in row for table in page.tables for row in table["rows"])


def test_the_same_runs_give_the_same_page_in_any_order(text: str) -> None:
    assert make_page(make_groups(runs()[::-1])) == text


def test_one_run_alone_is_a_page_too() -> None:
    page = Page(make_page(make_groups([made(questions=1, samples=1)])))
    assert [table["class"] for table in page.tables] == ["scores", "conditions"]
    assert "What the data say" not in page.texts["h3"]
    assert "nav" not in page.texts


def test_light_and_dark_are_both_styled(text: str) -> None:
    assert "color-scheme: light dark" in text
    assert "@media (prefers-color-scheme: dark)" in text
    for name in ("paper", "ink", "full", "s0"):
        assert len(re.findall(rf"--{name}: #[0-9a-f]{{6}};", text)) == 2
