"""Tables, plots and the page of a trace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean

from lim_sglang.bench.results import mean_and_error
from lim_sglang.evals.tables import Table
from lim_sglang.gates.training import disk_errors
from lim_sglang.markdown_section import counted, short_commit
from lim_sglang.plot_style import (
    DARK,
    FONT,
    LIGHT,
    MARKERS,
    SERIES,
    data_url,
    legend_below,
    settings,
    to_svg,
)
from lim_sglang.tracing.records import LayerRecord, Trace
from lim_sglang.tracing.summary import (
    CRITERION,
    Curve,
    Value,
    cumulative,
    mean_curve,
    means_of_questions,
    percent,
    running,
    shared_layers,
)

PAGE = "trace.html"
TEMPLATE = Path(__file__).with_name("trace.html.jinja")
NONE = "-"
OVERLAPS: Mapping[str, Value] = {
    "with sinks and recent": lambda record: record.jaccard,
    "without sinks and recent": lambda record: record.jaccard_ranked,
}
"""Overlap of the heads' own sets, by its name in tables and plots."""
CHANGES = {
    "from_step": "of the set from the step before, %",
    "from_layer": "of the set from the selecting layer below, %",
}
"""Columns of the changes of sets, by the field of a record."""
WINDOW = 8
"""Measured steps in a running mean."""
MANY_POINTS = 40
"""Points of a line from which it has no markers."""
PANEL_INCHES = (5.6, 4.4)


def all_records(trace: Trace) -> list[LayerRecord]:
    """Return the records of all questions."""
    return list(chain.from_iterable(question.layers for question in trace.questions))


def names(trace: Trace) -> list[str]:
    """Return the policies' names, the served one first."""
    return list(trace.conditions["policies"])


def policy_table(trace: Trace) -> Table:
    """Return recall and changes of each policy's sets, in percent."""
    head = ("policy", "recall, %", "lowest layer, %", *CHANGES.values())
    rows, layers, records = [], shared_layers(trace), all_records(trace)
    for name in names(trace):
        recall = percent("recall", name)
        by_layer = dict(mean_curve(records, "layer", recall))
        worst = f"{min(by_layer[n] for n in layers):.1f}" if layers else NONE
        recalls = means_of_questions(trace, recall, layers)
        changes = [means_of_questions(trace, percent(measure, name)) for measure in CHANGES]
        rows.append((name, _cell(recalls), worst, *map(_cell, changes)))
    return Table(head, tuple(rows))


def _cell(means: list[float]) -> str:
    """Return the mean over questions and its standard error."""
    if not means:
        return NONE
    mean, error = mean_and_error(means)
    return f"{mean:.1f}" + (f" \N{PLUS-MINUS SIGN} {error:.1f}" if error is not None else "")


def layer_table(trace: Trace) -> Table:
    """Return for each layer the overlap of the heads, the union's depth and the recalls."""
    records = all_records(trace)
    columns: dict[str, tuple[Value, int]] = {
        **{f"Jaccard {name}": (value, 2) for name, value in OVERLAPS.items()},
        "ranks deep": (lambda record: record.ranks_deep, 1),
        **{f"recall of {name}, %": (percent("recall", name), 1) for name in names(trace)},
    }
    curves = [(dict(mean_curve(records, "layer", of)), digits) for of, digits in columns.values()]
    rows = (
        (f"{layer}", *(f"{c[layer]:.{digits}f}" if layer in c else NONE for c, digits in curves))
        for layer in sorted({record.layer for record in records})
    )
    return Table(("layer", *columns), tuple(rows))


def overlap_text(trace: Trace) -> str:
    """Return what the overlap of the heads' own sets says by the criterion of C1."""
    parts = []
    for name, value in OVERLAPS.items():
        values = [y for _, y in mean_curve(all_records(trace), "layer", value)]
        if not values:
            return "The model has one query head: nothing overlaps."
        low = sum(value < CRITERION for value in values)
        parts.append(
            f"{name}: {fmean(values):.3f}, below {CRITERION:g} in {low} of "
            f"{counted(len(values), 'layer')}"
        )
    return f"Jaccard index of the heads' own top-k sets, mean over layers: {'; '.join(parts)}."


def conditions_text(trace: Trace) -> str:
    """Return the conditions in one paragraph."""
    found, versions = trace.conditions, trace.conditions["versions"]
    cut = sum(question.cut_off for question in trace.questions)
    lengths = [question.prompt_tokens + question.new_tokens for question in trace.questions]
    reach = " to ".join(f"{length:,}" for length in sorted({min(lengths), max(lengths)}))
    shared = len(shared_layers(trace))
    sparse = f"over the {counted(shared, 'layer')} that all policies read sparsely"
    if not shared:
        sparse = "not shown, as no layer is read sparsely by all policies"
    where = found["gpu"] or "CPU, f32"
    steps = {(each.question, record.step) for each in trace.questions for record in each.layers}
    return (
        f"{found['model']}, {where}, budget {found['budget']:,}; greedy answers to "
        f"{counted(len(trace.questions), 'question')}, decoded by {found['served']}, {reach} "
        f"tokens with their prompts, {cut} cut off at {found['max_tokens']:,} new tokens. "
        f"{counted(len(steps), 'step')} over the budget were measured, one in {found['every']}. "
        "Policies that do not decode choose by their definitions from the same queries and keys. "
        f"Recall is {sparse}; \N{PLUS-MINUS SIGN} one standard error over questions. "
        f"By `lim trace` on {found['date'][:10]}, commit {short_commit(found['commit'])}, torch "
        f"{versions.get('torch')}, SGLang {versions.get('sglang')}."
    )


def as_markdown(trace: Trace) -> str:
    """Return tables and conditions in Markdown."""
    tables = (policy_table(trace).markdown(), layer_table(trace).markdown())
    return "\n\n".join([tables[0], overlap_text(trace), tables[1], conditions_text(trace)])


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Curve]
    level: float | None = None
    """A value that a line marks."""


@dataclass(frozen=True)
class Plot:
    """A figure of panels side by side."""

    title: str
    description: str
    panels: tuple[Panel, ...]

    def svg(self) -> str:
        """Return the figure as an SVG file."""
        from matplotlib.figure import Figure

        width, height = PANEL_INCHES
        with settings(LIGHT):
            figure = Figure((width * len(self.panels), height), layout="constrained")
            places = figure.subfigures(1, len(self.panels), squeeze=False).flat
            for panel, place in zip(self.panels, places, strict=True):
                axes = place.subplots()
                for number, (name, curve) in enumerate(panel.curves.items()):
                    if not curve:  # a policy has one colour in all panels
                        continue
                    axes.plot(
                        *zip(*curve, strict=True),
                        label=name,
                        color=LIGHT[SERIES[number % len(SERIES)]],
                        marker=MARKERS[number % len(MARKERS)] if len(curve) < MANY_POINTS else "",
                        markersize=4,
                    )
                if panel.level is not None:
                    axes.axhline(panel.level, color=LIGHT["faint"], linestyle="--")
                axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
                legend_below(place, axes)
            return to_svg(figure, title=self.title, description=self.description)


def plots(trace: Trace) -> dict[str, Plot]:
    """Return the plots by the names of their files; a panel without a curve is left out."""
    records, layers = all_records(trace), shared_layers(trace)

    def curves(measure: str, x: str, chosen: Sequence[LayerRecord] = records) -> dict[str, Curve]:
        return {n: mean_curve(chosen, x, percent(measure, n)) for n in names(trace)}

    recall = curves("recall", "step", [record for record in records if record.layer in layers])
    sums = {name: cumulative(curve) for name, curve in recall.items()}
    newest = {name: running(curve, WINDOW) for name, curve in recall.items()}
    overlaps = [
        {name: mean_curve(records, x, value) for name, value in OVERLAPS.items()}
        for x in ("layer", "step")
    ]
    mass, same, jaccard = "attention mass in the set, %", "of the set, %", "Jaccard index"
    newest_title = f"mean of the newest {WINDOW} measured steps"
    found = {
        "recall": Plot(
            "Attention recall over decode steps",
            "Share of the attention mass that is in each policy's set, mean over heads and the "
            "layers that all policies read sparsely.",
            (
                Panel("mean of all steps so far", "decode step", mass, sums),
                Panel(newest_title, "decode step", mass, newest),
            ),
        ),
        "layers": Plot(
            "Attention recall by layer",
            "Share of the attention mass that is in each policy's set, in layers that the policy "
            "reads sparsely.",
            (Panel("attention recall", "layer", mass, curves("recall", "layer")),),
        ),
        "overlap": Plot(
            "Overlap of the heads",
            f"Jaccard index of the heads' own top-k sets, with the criterion of {CRITERION:g}. "
            "Sets of short requests overlap by chance.",
            (
                Panel("by layer", "layer", jaccard, overlaps[0], CRITERION),
                Panel("mean over layers", "decode step", jaccard, overlaps[1], CRITERION),
            ),
        ),
        "changes": Plot(
            "Change of the sets",
            "Share of a set that the same layer's set of the step before has, and that the set of "
            "the next lower layer that selects has.",
            (
                Panel("from the step before", "decode step", same, curves("from_step", "step")),
                Panel("from the layer below", "layer", same, curves("from_layer", "layer")),
            ),
        ),
    }
    for name, plot in found.items():
        found[name] = replace(plot, panels=tuple(p for p in plot.panels if any(p.curves.values())))
    return found


def write_page(trace: Trace, folder: Path) -> Path:
    """Write the page, which loads nothing, and its plots as files; return the page's path.

    Raises:
        DataError: the folder cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(light=LIGHT, dark=DARK, font=FONT)
    pictures, files = [], {}
    for name, plot in plots(trace).items():
        if plot.panels:
            svg = plot.svg()
            files[f"{name}.svg"] = svg
            pictures.append((plot, data_url(svg)))
    files[PAGE] = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=trace.conditions["model"],
        conditions=conditions_text(trace),
        overlap=overlap_text(trace),
        tables={"Policies": policy_table(trace), "Layers": layer_table(trace)},
        pictures=pictures,
    )
    with disk_errors(folder):
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
    return folder / PAGE
