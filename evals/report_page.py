"""The report as one HTML file that loads nothing: no network, no scripts, no fonts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lim_sglang.evals.plots import PLOTS, Plot, draw_svg
from lim_sglang.evals.report import Group, Repeat
from lim_sglang.evals.run_store import AskedQuestion
from lim_sglang.evals.sections import method_text, table_text
from lim_sglang.evals.tables import (
    Table,
    condition_table,
    disagreement_table,
    group_table,
    measure,
    past_budget,
    percent,
    question_table,
    sentence,
    signed,
)
from lim_sglang.markdown_section import counted
from lim_sglang.plot_style import DARK, FONT, LIGHT, data_url

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Section:
    """One group of runs in the page."""

    name: str
    """Id of the section in the page."""
    group: Group
    conditions: str
    scores: Table
    method: str
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    """Conditions other than the policy in which runs differ from full attention."""
    left_out: tuple[str, ...]
    """Notes on runs that repeat the conditions of a run of the group."""
    pictures: tuple[tuple[Plot, str], ...]
    """Plots, with their files as data URLs."""
    missing: tuple[str, ...]
    """Why other plots are left out, in sentences."""
    disagreements: Table
    questions: Table
    asked: Mapping[str, AskedQuestion]
    """Text and reference answer of questions, as far as they are known, by id."""
    all_conditions: Table


def make_page(
    groups: Sequence[Group],
    asked: Mapping[str, Mapping[str, AskedQuestion]] | None = None,
    repeats: Sequence[Repeat] = (),
) -> str:
    """Return the HTML file; the same runs give the same text.

    Args:
        asked: questions by digest and id; see `load_asked`.
        repeats: runs that are left out.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        counted=counted, measure=measure, percent=percent, signed=signed, past_budget=past_budget
    )
    environment.globals.update(light=LIGHT, dark=DARK, font=FONT)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    sections = [
        _make_section(
            group, f"table{n}", (asked or {}).get(group.values("questions")[0], {}), repeats
        )
        for n, group in enumerate(groups, start=1)
    ]
    return template.render(sections=sections)


def _make_section(
    group: Group, name: str, asked: Mapping[str, AskedQuestion], repeats: Sequence[Repeat]
) -> Section:
    missing = {plot.name: plot.missing(group) for plot in PLOTS}
    names = {id(row.summary): row.name for row in group.rows}
    compared = [(row.name, row.against_full) for row in group.rows if row.against_full]
    return Section(
        name=name,
        group=group,
        conditions=table_text(group).replace("`", ""),
        scores=group_table(group),
        method=method_text([group]),
        sentences=tuple(sentence(found) for _, found in compared),
        notes=tuple(
            f"{found.a} and {row} also differ in {'; '.join(found.other_differences)}."
            for row, found in compared
            if found.other_differences
        ),
        left_out=tuple(
            repeat.sentence(lambda run: names.get(id(run), run.run_id))
            for repeat in repeats
            if id(repeat.kept) in names
        ),
        pictures=tuple(
            (plot, data_url(draw_svg(plot, [group]))) for plot in PLOTS if not missing[plot.name]
        ),
        missing=tuple(dict.fromkeys(filter(None, missing.values()))),
        disagreements=disagreement_table(group.rows),
        questions=question_table(group.rows),
        asked=asked,
        all_conditions=condition_table(group),
    )
