"""The report as one HTML file that needs nothing else: no network, no scripts, no fonts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lim_sglang.evals.plots import PLOTS, draw_svg
from lim_sglang.evals.report import Group, Row
from lim_sglang.evals.tables import (
    MOST_CONTESTED,
    NONE,
    Column,
    Contested,
    columns,
    conditions,
    contested,
    method,
    signed,
    to,
)
from lim_sglang.plot_style import DARK, FONT, LIGHT, PAGE_STYLE

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Tile:
    """One run's headline."""

    name: str
    value: str
    error: str
    measure: str
    """Of which this is the value."""
    difference: str | None
    """To full attention, in points."""
    interval: str
    is_full: bool
    excludes_zero: bool
    """Whether the difference is more than chance explains."""


@dataclass(frozen=True)
class Picture:
    """A plot in the page."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Condition:
    """One condition of all runs of a table."""

    name: str
    values: tuple[str, ...]
    """Of each run; one value if they share it."""


@dataclass(frozen=True)
class Section:
    """What the page says of one table's runs."""

    name: str
    """Its id in the page."""
    group: Group
    tiles: tuple[Tile, ...]
    summary: str
    """The conditions in a sentence."""
    method: str
    columns: tuple[Column, ...]
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    pictures: tuple[Picture, ...]
    contested: tuple[Contested, ...]
    conditions: tuple[Condition, ...]


def make_page(groups: Sequence[Group]) -> str:
    """The whole file; the same runs give the same text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        sections=[_section(group, f"table{n}") for n, group in enumerate(groups, start=1)],
        light=LIGHT,
        dark=DARK,
        font=FONT,
        plot_style=PAGE_STYLE,
        most_contested=MOST_CONTESTED,
    )


def _section(group: Group, name: str) -> Section:
    return Section(
        name=name,
        group=group,
        tiles=tuple(_tile(row) for row in group.rows),
        summary=conditions(group).replace("`", ""),
        method=method([group]),
        columns=columns(group),
        sentences=tuple(row.against_full.sentence for row in group.rows if row.against_full),
        notes=tuple(_notes(group)),
        pictures=tuple(
            Picture(
                plot.title,
                plot.caption,
                draw_svg(plot, [group], name=f"{name}-{plot.name}", alone=False),
            )
            for plot in PLOTS
        ),
        contested=tuple(contested(group.rows)) if len(group.rows) > 1 else (),
        conditions=tuple(all_conditions(group)),
    )


def _tile(row: Row) -> Tile:
    found, difference = row.accuracy, row.difference
    return Tile(
        name=row.name,
        value=f"{100 * found.value:.1f}",
        error="?" if found.error is None else f"{100 * found.error:.1f}",
        measure="pass@1" if row.draws_all else "vote right",
        difference=signed(difference.value) if difference else None,
        interval=to(difference) if difference else "",
        is_full=row.is_full,
        excludes_zero=bool(difference and difference.excludes_zero),
    )


def _notes(group: Group) -> Iterator[str]:
    """What keeps two runs from differing in nothing but their policy."""
    for row in group.rows:
        if row.against_full and row.against_full.other_differences:
            told = "; ".join(row.against_full.other_differences)
            yield f"{row.against_full.a} and {row.name} also differ in {told}."


def all_conditions(group: Group) -> Iterator[Condition]:
    """Every condition, also those that are part of another, such as the version of each package."""
    runs = [dict(_flat({"run": r.summary.run_id, **r.conditions})) for r in group.rows]
    names = dict.fromkeys(name for run in runs for name in run)
    for name in names:
        values = tuple(_text(run.get(name)) for run in runs)
        yield Condition(name, values[:1] if len(set(values)) == 1 else values)


def _flat(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _text(value: object) -> str:
    if value is None or value == {}:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NONE
    return f"{value:,}" if isinstance(value, int) else str(value)
