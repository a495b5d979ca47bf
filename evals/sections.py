"""Sections of the documents that `lim report` writes: tables with their conditions and methods."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lim_sglang.config import LimConfig
from lim_sglang.errors import reasons_that_hold
from lim_sglang.evals.metrics import MIN_QUESTIONS, NO_MAJORITY
from lim_sglang.evals.report import Group, Row, describe
from lim_sglang.evals.tables import (
    ALL_READ,
    PLUS_MINUS,
    RIGHT_VOTES,
    TIMES,
    difference_cell,
    group_table,
    past_budget,
    percent,
    ratio_cell,
    seconds_note,
    too_few,
)
from lim_sglang.markdown_section import MarkdownSection, join_words, markdown_table, short_commit
from lim_sglang.programs.schema import copies_note

SECTION = MarkdownSection("lim report")
NOT_MEASURED = "Accuracy: not measured yet."
MCNEMAR = "McNemar's exact test compares the votes. "
COUNTED = (
    f"{MCNEMAR}Cut off: samples that reached the limit of new tokens. No answer: samples of "
    "which none could be read, cut off or not; they count as wrong. Length ratios are relative to "
    "full; tokens a right sample count all generated tokens."
)
METHOD = (
    f"{PLUS_MINUS} is one standard error, clustered by question. Differences of pass@1 are paired "
    "by question, with 95 % intervals by bootstrap over questions, not corrected for their number; "
    f"{COUNTED}"
)
READ = (
    "Read: the share of their tokens, at most, that one query head of a sparse layer reads in the "
    "decode steps of all samples; where heads have lists of their own, a KV head reads more."
)
STOPPING = (
    "Programs that stop early take more samples of the questions on which samples disagree, so "
    "they are judged by their votes and by the tokens of a question."
)
PACKAGES = {"sglang_server": "SGLang", "torch": "torch", "math_verify": "Math-Verify"}
"""Versions in a table's conditions, and their names there."""
MAX_PROOF_ROWS = 2


def results_section(groups: Sequence[Group], plot: str | None = None) -> str:
    """Return all tables in Markdown, each with its conditions.

    Args:
        plot: link to the plot of accuracy over budget.
    """
    if not groups:
        return NOT_MEASURED
    parts = [
        f"{group_table(group).markdown()}\n\n{group.title}: {table_text(group)}" for group in groups
    ]
    picture = [f"![Accuracy over budget]({plot})"] if plot else []
    return "\n\n".join([*parts, method_text(groups), *picture])


def proof_section(groups: Sequence[Group], results: str | None = None) -> str:
    """Return the chosen rows in Markdown, with their conditions.

    Args:
        results: link to the document with all rows.
    """
    chosen = proof_rows(groups)
    if not chosen:
        return NOT_MEASURED
    head = ("accuracy", "full, %", "sparse, %", "difference, points (95 %)", "length ratio (95 %)")
    table = markdown_table(head, [_proof_cells(group, row) for group, row in chosen])
    conditions = [
        f"{group.title}: {conditions_text(replace(group, rows=rows))}"
        for group in groups
        if (rows := _full_and(group, [row for each, row in chosen if each is group]))
    ]
    link = f" [All rows]({results})." if results else ""
    method = f"{PLUS_MINUS} one standard error; differences are paired by question."
    return "\n\n".join([table, *conditions, f"{method}{link}"])


def proof_rows(groups: Sequence[Group]) -> list[tuple[Group, Row]]:
    """Choose the rows on both sides of the limit: the smallest budget for which the data show no
    loss, then the largest budget for which they show one; groups with the most samples first. Only
    rows of the default policy are chosen. Runs of too few questions, and runs that read everything,
    show neither.
    """
    chosen: list[tuple[Group, Row]] = []
    for group in sorted(groups, key=lambda g: -sum(row.score.num_samples for row in g.rows)):
        ours = [row for row in group.rows if row.conditions["policy"] == LimConfig.policy]
        compared = [row for row in ours if _shows_something(row)]
        losing = [row for row in compared if _shows_loss(row)]
        other = [row for row in compared if not _shows_loss(row)]
        chosen += [(group, row) for row in (*other[-1:], *losing[:1])]
    return chosen[:MAX_PROOF_ROWS]


def _shows_something(row: Row) -> bool:
    found, grown = row.against_full, row.score.past_budget
    return bool(found and found.headline_difference.bounds and grown and grown.count)


def _shows_loss(row: Row) -> bool:
    difference = row.against_full.headline_difference if row.against_full else None
    return bool(difference and difference.excludes_zero and difference.value < 0)


def _proof_cells(group: Group, row: Row) -> tuple[str, ...]:
    found = row.against_full
    assert found, "proof_rows chooses compared rows only"
    full = next(each for each in group.rows if each.name == found.a)
    by_votes = found.stops_by_itself
    both = [r.score.vote_correct if by_votes else r.score.pass_at_1 for r in (full, row)]
    name = f"{group.title}, {row.name}, {RIGHT_VOTES if by_votes else 'pass@1'}"
    return name, *map(percent, both), difference_cell(row), ratio_cell(row)


def _full_and(group: Group, chosen: Sequence[Row]) -> tuple[Row, ...]:
    """Return the chosen rows after those that they are compared with."""
    named = {row.against_full.a for row in chosen if row.against_full}
    return (*(row for row in group.rows if row.name in named), *chosen)


def method_text(groups: Sequence[Group]) -> str:
    """Return how the figures of the tables were computed."""
    any_stops_early = any(row.stops_early for group in groups for row in group.rows)
    has_errors = any(group.num_questions >= MIN_QUESTIONS for group in groups)
    method = METHOD if has_errors else COUNTED
    has_votes = any(row.score.has_majority for group in groups for row in group.rows)
    if not (has_votes and has_errors):
        method = method.replace(MCNEMAR, "")
    grown = [row.score.past_budget for group in groups for row in group.rows]
    notes = reasons_that_hold(
        (any(each and each.read_share is not None for each in grown), READ),
        (any_stops_early, STOPPING),
    )
    return " ".join([method, *notes])


def conditions_text(group: Group) -> str:
    """Return the conditions of a table's figures in a sentence or two."""
    values = {name: group.values(name)[0] for name in ("temperature", "top_p", "top_k")}
    sampling = [
        f"{_counted(group, 'asked', 'question')} {TIMES} {_counted(group, 'samples', 'sample')}",
        f"at most {_all_values(group, 'max_tokens')} new tokens",
        *(describe(name, value) for name, value in values.items()),
        *_concurrency(group),
    ]
    stack = [_all_values(group, "device_name"), *_versions(group.values("versions"))]
    commits = join_words(map(short_commit, group.values("commit")))
    days = join_words(sorted(map(str, group.values("date"))))
    notes = "".join(f" {row.name}: {row_note(row)}." for row in group.rows if row_note(row))
    if group.num_questions < MIN_QUESTIONS:
        notes = f" {too_few(group.num_questions)}.{notes}"
    if copies := copies_note(values, group.num_samples):
        notes += f" {copies[0].upper()}{copies[1:]}."
    if not all(row.score.has_majority for row in group.rows):
        notes += f" Votes: {NO_MAJORITY}."
    return (
        f"{', '.join(sampling)}; {', '.join(stack)}. By `lim eval` on {days}, commit "
        f"{commits}.{notes}"
    )


def table_text(group: Group) -> str:
    """Return what stands below a group's table: its conditions, and the note on its seconds."""
    note = seconds_note(group)
    return f"{conditions_text(group)}{note and f' {note[0].upper()}{note[1:]}.'}"


def row_note(row: Row) -> str:
    """Return the reservations about a run's figures; empty where there are none."""
    grown = row.score.past_budget
    parts = [row.note] if row.note else []
    if grown and grown.is_none:
        parts.append(ALL_READ)
    elif grown and (not grown.count or (grown.is_exact and 2 * grown.count < grown.num_samples)):
        parts.append(f"{past_budget(grown)} samples grew past the budget")
    return "; ".join(parts)


def _concurrency(group: Group) -> list[str]:
    limits = [f"{each:,}" for each in group.values("concurrency") if each]
    return [f"at most {join_words(limits)} requests at a time"] if limits else []


def _all_values(group: Group, condition: str) -> str:
    unknown = f"unknown {condition.replace('_', ' ')}"
    values = group.values(condition)
    return join_words(f"{each:,}" if type(each) is int else each or unknown for each in values)


def _counted(group: Group, condition: str, noun: str) -> str:
    plural = "" if group.values(condition) == [1] else "s"
    return f"{_all_values(group, condition)} {noun}{plural}"


def _versions(runs: Iterable[Mapping[str, Any] | None]) -> Iterator[str]:
    versions = [each or {} for each in runs]
    for package, label in PACKAGES.items():
        known = dict.fromkeys(str(each[package]) for each in versions if each.get(package))
        if known:
            yield f"{label} {join_words(known)}"
