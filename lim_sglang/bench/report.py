"""`lim bench report`: the README's table and the roofline plot, from what was recorded."""

import os
from pathlib import Path
from typing import Annotated

import typer


def write_report(
    files: Annotated[list[Path], typer.Argument(help="What `lim bench decode --out` has written.")],
    update: Annotated[
        Path | None,
        typer.Option(help="A Markdown file: the text between its markers is replaced."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="An SVG file: step time over context, with the limit.")
    ] = None,
) -> None:
    """Write the table of recorded decode rows, and draw them; needs no GPU."""
    from lim_sglang.bench.decode_section import PART, make_section
    from lim_sglang.bench.recorded import read_recorded
    from lim_sglang.bench.roofline import draw

    recorded = read_recorded(files)
    link = os.path.relpath(plot, update.parent) if update and plot else None
    section = make_section(recorded, link)
    # All is made before anything is written, so that a refusal leaves no half of it.
    changed = PART.replace_in(update, section) if update else None
    drawn = draw(recorded) if plot else None
    if update and changed is not None:
        update.write_text(changed)
        typer.echo(f"The table is in {update}.")
    else:
        typer.echo(section)
    if plot and drawn is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_text(drawn)
        typer.echo(f"The plot is in {plot}.", err=True)
