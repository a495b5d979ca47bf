"""Step time over context, dense and LessIsMore, beside the time of the necessary bytes alone."""

from pathlib import Path

import numpy as np

from lim_sglang.bench.results import DecodeTable
from lim_sglang.bench.workloads import Point, SparseReads, step_bytes
from lim_sglang.config import BACKEND
from lim_sglang.errors import DataError
from lim_sglang.plot_style import LIGHT, settings, to_svg

COLUMNS, PANEL_INCHES = 3, (4.0, 3.6)
DESCRIPTION = "Measured steps, and the time of their bytes at copy speed; a panel per batch size."


def draw(table: DecodeTable, path: Path) -> None:
    """Write a plot as SVG, a panel per batch size; leave out mixed batches, of several contexts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    points = [point for point in table.points if not point.is_mixed]
    if not points:
        raise DataError("every row is of a mixed batch, without one context: leave --plot out")
    found, batches = table.conditions, sorted({point.batch for point in points})
    columns, rows = min(len(batches), COLUMNS), -(-len(batches) // COLUMNS)
    lengths = [point.longest for point in points]
    contexts = np.geomspace(min(1024, *lengths), max(lengths))
    with settings(LIGHT):
        size = (columns * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 0.8)
        figure = Figure(size, layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, batch in zip(panels.flat, batches, strict=False):
            here = [point for point in points if point.batch == batch]
            ours = [table.rows.get((point, BACKEND)) for point in here]
            for name, measured, budget, colour in (
                ("fastest dense", [*map(table.fastest_dense, here)], None, LIGHT["full"]),
                ("LessIsMore", ours, found["budget"], LIGHT["s0"]),
            ):
                steps = [(row.point.longest, row.step_ms.median) for row in measured if row]
                axes.plot(*np.reshape(steps, (-1, 2)).T, "o-", color=colour, label=name)
                at = [Point((round(x),) * batch) for x in contexts]
                reads = [SparseReads.shared(each, found, budget) if budget else None for each in at]
                read = [step_bytes(each, found, of) for each, of in zip(at, reads, strict=True)]
                limits = np.divide(read, found["copy_gb_per_s"] * 1e6)
                axes.plot(contexts, limits, "--", color=colour, label=f"{name}, byte limit")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K")
            axes.yaxis.set_major_locator(LogLocator(2, subs=(1, 1.5)))
            axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
            axes.set(title=f"{batch} request{'s' * (batch > 1)}", xlabel="context, tokens")
            axes.set_ylabel("decode step, ms")
        for axes in panels.flat[len(batches) :]:
            axes.set_visible(False)
        figure.suptitle(title := f"{table.model}, {table.gpus}, budget {found['budget']:,}")
        handles = panels.flat[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        name = f"Decode step over context: {title}"
        path.write_text(to_svg(figure, title=name, description=DESCRIPTION))
