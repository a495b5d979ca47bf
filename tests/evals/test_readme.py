"""The README says what the committed summaries give, no more and no less."""

import re
from pathlib import Path

from lim_sglang.evals.commands import README_PLOT
from lim_sglang.evals.metrics import read_summary
from lim_sglang.evals.plots import PLOTS, draw_svg
from lim_sglang.evals.report import Group, make_groups
from lim_sglang.evals.tables import NOT_MEASURED, PART, make_section
from tests.evals.made_summaries import five_runs

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "docs" / "measured" / "eval"


def committed() -> tuple[Group, ...]:
    """What has been measured."""
    files = sorted(MEASURED.glob("*.json"))
    return make_groups([read_summary(path) for path in files]) if files else ()


def shown() -> str:
    """What the README has between its markers."""
    found = re.search(
        f"{PART.begin}\n(.*?)\n{PART.end}", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found, f"README.md needs the lines {PART.begin} and {PART.end}"
    return found[1]


def agrees(section: str, groups: tuple[Group, ...]) -> bool:
    """Whether a README's section says what these runs give, wherever its picture lies."""
    return section == make_section(groups, link_in(section))


def link_in(section: str) -> str | None:
    """Where the section finds its picture."""
    found = re.search(r"!\[[^\]]*\]\(([^)]+)\)", section)
    return found[1] if found else None


def test_the_readme_has_what_the_committed_summaries_give() -> None:
    section = shown()
    link = link_in(section)
    assert agrees(section, committed())
    assert bool(link) == bool(committed())
    if link:
        (plot,) = (each for each in PLOTS if each.name == README_PLOT)
        assert (ROOT / link).read_text() == draw_svg(plot, committed(), name=plot.name, alone=True)


def test_nothing_measured_is_said_in_words() -> None:
    assert make_section(()) == NOT_MEASURED
    assert "not measured yet" in NOT_MEASURED


def test_a_wrong_number_in_the_section_is_found() -> None:
    groups = make_groups(five_runs(20))
    section = make_section(groups, "docs/accuracy.svg")
    assert link_in(section) == "docs/accuracy.svg"
    assert agrees(section, groups)
    for number in re.finditer(r"\d+\.\d+", section.split("\n\n")[0]):
        digit = str((int(number[0][-1]) + 1) % 10)
        planted = section[: number.end() - 1] + digit + section[number.end() :]
        assert not agrees(planted, groups)


def test_published_models_have_their_hub_names() -> None:
    for group in committed():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", str(group.rows[0].conditions["model"]))
