"""The commands over stored runs: `lim grade`, `lim compare` and `lim report`."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.tables import print_table
from lim_sglang.markdown_section import MarkdownSection, counted
from lim_sglang.progress import plain_console, print_plain, show_progress

if TYPE_CHECKING:
    from lim_sglang.evals.compare import Comparison
    from lim_sglang.evals.equal_time import EqualTime
    from lim_sglang.evals.report import Group


def read_pairs(option: str, form: str, texts: Sequence[str]) -> dict[str, str]:
    """Read texts of the form `NAME=VALUE`: each name with its value, spaces around them dropped.

    Args:
        form: of a text, for people.

    Raises:
        ConfigError: a text of another form, or a name that is given twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if not (name and value):
            raise ConfigError(f"{option} takes {form}, not {text}")
        if name in pairs:
            raise ConfigError(f"{option} is given twice for {name}")
        pairs[name] = value
    return pairs


MAX_WORKERS = 16
"""Most workers by default: each has to import math-verify, which takes seconds, first."""


def grade(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders of these.")],
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of math-verify.",
            show_default=f"one a core, {MAX_WORKERS} at most",
        ),
    ] = None,
) -> None:
    """Extract and grade the answers of a run's samples again: after a correction of the grader, or
    to check verdicts on another machine. The samples stay as they are; grades.jsonl beside them
    gets the new verdicts, all of them or, if interrupted, none."""
    from lim_sglang.evals.grading import Grader, grade_run
    from lim_sglang.evals.run_store import load_run
    from lim_sglang.evals.summaries import check_distinct, check_paths, find_runs, recorded_task
    from lim_sglang.programs.grading.equivalence import EquivalenceChecker

    num_workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    # Refused before the first run is graded: folders without a run, and unknown tasks.
    check_paths(runs)
    # A folder's summaries hold no text.
    found = [path for path in find_runs(runs) if path in runs or path.is_dir()]
    if not found:
        raise ConfigError(
            f"{', '.join(map(str, runs))} holds summaries alone, which keep no text to grade: name "
            "folders of runs"
        )
    check_distinct(found)
    loaded = [load_run(path) for path in found]
    kinds = [recorded_task(run).answer_kind for run in loaded]
    with EquivalenceChecker(num_workers=num_workers) as checker:
        for run, kind in zip(loaded, kinds, strict=True):
            name, total = f"grading {run.path}", len(run.samples)
            with show_progress(plain_console(stderr=True), total, name) as show:
                result = grade_run(
                    run,
                    Grader(kind, checker),
                    num_threads=num_workers,
                    on_graded=partial(_show_graded, show, name, total),
                )
            typer.echo(
                f"{run.path}: {result.num_right} of {result.num_samples} right, "
                f"{result.num_changed} changed"
            )


def _show_graded(show: Callable[[float, str], None], name: str, total: int, done: int) -> None:
    show(done, f"{name}: {done:,} of {counted(total, 'sample')}")


MULTIPLE_COMPARISONS = "Of 20 comparisons without any difference, expect one to show a difference."


def compare_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders or summaries of runs, or folders of these; of each task the first run is "
            "compared with each of the others."
        ),
    ],
    common: Annotated[
        bool, typer.Option("--common", help="Compare the questions that both runs have.")
    ] = False,
    per_second: Annotated[
        bool,
        typer.Option(
            "--per-second",
            help="Compare votes at equal time, too: as many samples of each run as take the same "
            "seconds. The slower run goes first.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a comparison.")] = False,
) -> None:
    """Compare runs of the same questions: difference with a 95 % interval, McNemar's test on the
    votes, ratio of lengths, and a sentence on what these show."""
    from lim_sglang.evals.compare import compare, distinct_names
    from lim_sglang.evals.equal_time import equal_times
    from lim_sglang.evals.summaries import check_paths, load_by_task
    from lim_sglang.evals.tables import comparison_table, equal_time_table, sentence
    from lim_sglang.evals.tasks import OWN_FILE

    check_paths(runs)
    errors = plain_console(stderr=True)
    comparisons: list[tuple[str, Comparison]] = []
    times: list[list[EqualTime]] = []
    tasks, empty = load_by_task(runs, errors)
    unequal: list[DataError] = []
    for first, *others in tasks:
        name, *names = distinct_names((first, *others))
        for other, other_name in zip(others, names, strict=True):
            try:
                found = compare(first, other, names=(name, other_name), common=common, seed=seed)
                comparisons.append((first.conditions["task"], found))
                times.append([])
                if per_second:
                    times[-1] = equal_times(first, other, common=common, seed=seed)
            except DataError as problem:
                unequal.append(problem)
    alone = [run for run, *others in tasks if not others]
    left_out = [
        *(f"{path} has no sample yet" for path in empty),
        *(f"{run.label} is the only run of {run.conditions['task']}" for run in alone),
    ]
    if sum(run.conditions["task"].startswith(OWN_FILE) for run in alone) > 1:
        left_out.append("files of one name are one task: an edited file keeps its name")
    if not comparisons:
        if unequal:
            raise DataError("\n".join(map(str, unequal)))
        raise ConfigError(
            "; ".join(
                ["lim compare needs two runs of a task: the reference, then the others", *left_out]
            )
        )
    for reason in (*left_out, *unequal):
        print_plain(errors, f"warning: left out: {reason}")
    if as_json:
        for (task, found), rows in zip(comparisons, times, strict=True):
            row = {"task": task, **asdict(found), "sentence": sentence(found)}
            if per_second:
                row["equal_time"] = [asdict(each) for each in rows]
            typer.echo(json.dumps(row, ensure_ascii=False))
        return
    for (task, found), rows in zip(comparisons, times, strict=True):
        table = comparison_table(found)
        if len(tasks) > 1:
            table = replace(table, title=f"{task}: {table.title}")
        print_table(plain_console(), table)
        print_plain(plain_console(), sentence(found))
        if rows:
            print_table(plain_console(), equal_time_table(found, rows))
        for difference in found.other_differences:
            print_plain(errors, f"warning: {found.a} and {found.b} differ in {difference}")
    if sum(found.difference.bounds is not None for _, found in comparisons) > 1:
        print_plain(plain_console(), MULTIPLE_COMPARISONS)


MARKERS = MarkdownSection("lim report").markers
DOCUMENT_PLOT = "accuracy"
"""The plot to which `--results` links."""


def write_report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders or summaries of runs, or folders that contain these."),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write everything to an HTML file that needs no network; of run folders, with "
            "the questions and reference answers."
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots to a folder, each as SVG and as PNG.")
    ] = None,
    summaries: Annotated[
        Path | None,
        typer.Option(help="Write the runs' summaries, which hold no text, to a folder."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help=f"Replace the text between {MARKERS} of a Markdown file by all tables.",
        ),
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(
            help="Replace the text between the same lines of a Markdown file by the rows on both "
            "sides of the limit: the smallest budget without a loss, the largest with one."
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER=MODEL",
            help="The published name of a model that was served from a local folder; repeatable.",
        ),
    ] = None,
) -> None:
    """Report runs with their conditions; without options, print the tables: drawn on a terminal,
    in Markdown to a file or a pipe."""
    from lim_sglang.evals.report import leave_out_repeats, make_groups
    from lim_sglang.evals.summaries import (
        find_runs,
        load_asked,
        load_summaries,
        rename_models,
        write_summaries,
    )

    names = read_pairs("--name", "FOLDER=MODEL", name or [])
    paths = find_runs(runs)
    errors = plain_console(stderr=True)
    loaded, repeats = leave_out_repeats(rename_models(load_summaries(paths, errors), names))
    for repeat in repeats:
        print_plain(errors, f"warning: {repeat.sentence()}")
    groups = make_groups(loaded)
    typer.echo(f"{counted(len(loaded), 'run')} in {counted(len(groups), 'table')}", err=True)
    for group in groups if len(groups) > 1 else ():
        for row in group.rows:
            run = f"{row.summary.label} ({row.summary.run_id})"
            print_plain(errors, f"  {group.title}: {row.name} is {run}", whole=True)
    asked = load_asked(paths) if html else {}
    # Everything is made before anything is written, so that an error leaves no half of a report.
    files = _make_files(groups, plots=plots, results=results, update=update)
    if html:
        from lim_sglang.evals.report_page import make_page

        files[html] = make_page(groups, asked, repeats)
    written = [*_write_files(files), *(write_summaries(loaded, summaries) if summaries else [])]
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if not written:
        _print_results(groups)


def _print_results(groups: Sequence["Group"]) -> None:
    """Print all tables: drawn on a terminal, else in Markdown."""
    from lim_sglang.evals.sections import method_text, results_section, table_text
    from lim_sglang.evals.tables import group_table

    console = plain_console()
    if not console.is_terminal:
        typer.echo(results_section(groups))
        return
    for group in groups:
        print_table(console, group_table(group))
        print_plain(console, f"{group.title}: {table_text(group)}\n")
    print_plain(console, method_text(groups))


def _make_files(
    groups: Sequence["Group"],
    *,
    plots: Path | None,
    results: Path | None,
    update: Path | None,
) -> dict[Path, str | bytes]:
    """Return the contents of all requested files except the summaries and the page; print which
    plots no group has data for.
    """
    from lim_sglang.evals.metrics import MIN_QUESTIONS
    from lim_sglang.evals.plots import PLOTS, draw_png, draw_svg
    from lim_sglang.evals.sections import SECTION, proof_rows, proof_section, results_section

    files: dict[Path, str | bytes] = {}
    missing: dict[str, None] = {}
    if plots:
        for each in PLOTS:
            if shown := [group for group in groups if not each.missing(group)]:
                files[plots / f"{each.name}.svg"] = draw_svg(each, shown)
                files[plots / f"{each.name}.png"] = draw_png(each, shown)
            else:
                whys = [(group.title, each.missing(group)) for group in groups]
                missing |= dict.fromkeys(f"{title}: {why}" for title, why in whys if why)
    for sentence in missing:
        print_plain(plain_console(stderr=True), sentence)
    if results:
        file = plots / f"{DOCUMENT_PLOT}.svg" if plots else None
        plot = _link(results, file) if file in files else None
        files[results] = SECTION.replace_in(results, results_section(groups, plot))
    if update:
        proof = proof_section(groups, _link(update, results) if results else None)
        files[update] = SECTION.replace_in(update, proof)
        if not proof_rows(groups):
            raise DataError(
                f"--update {update}: no run of LessIsMore beside one of full attention, on "
                f"at least {MIN_QUESTIONS} questions and past its budget, has a row for it; "
                "--results shows all tables"
            )
    return files


def _link(document: Path, target: Path) -> str:
    """Return the relative link from a document to another file."""
    return Path(os.path.relpath(target, document.parent)).as_posix()


def _write_files(files: Mapping[Path, str | bytes]) -> list[Path]:
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise DataError(
                f"cannot write {path} ({error.strerror}); name another file, or make room"
            ) from None
    return list(files)
