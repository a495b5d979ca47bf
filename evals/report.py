"""Runs grouped for a report, pure: shared tables, distinct names, comparisons with full."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import (
    POLICY,
    PROVENANCE,
    Comparison,
    compare,
    policy_name,
    policy_title,
)
from lim_sglang.evals.metrics import Estimate, Score, Summary, score, stops_early
from lim_sglang.markdown_section import counted

FULL = "full"
SHARED = (
    "task",
    "task_version",
    "questions",
    "prompt_sha256",
    "system_sha256",
    "model",
    "thinking",
    "thinking_budget",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
)
"""Conditions that all rows of a table share; runs with other values have another table."""
TITLE = ("task", "model")
"""Conditions in the title of every table; others follow if two tables share these."""
DISTINCTIVE = (
    *("select_layers", "pick_layers", "dense_layers", "recent_ratio", "sinks", "shared_by"),
    "draft_tokens",
    *("options", "samples"),
)
"""Conditions that tell rows of the same name apart before all others are tried."""
UNNAMED = ("date", "commit", "requests_by_session")
"""Conditions that never tell rows apart."""
REQUIRED = ("task", "model", "policy", "program", "samples", "asked", "max_tokens")
"""Conditions without which a run cannot be shown."""


@dataclass(frozen=True)
class Row:
    """One run in a table."""

    policy: str
    budget: int | None
    """Tokens that a sparse layer reads; None: all."""
    variant: str
    """Differences to the other rows, each behind a comma; mostly empty."""
    summary: Summary
    score: Score
    against_full: Comparison | None = None
    """None for full attention itself, and without a comparable run of it."""
    note: str | None = None
    """Reservations about the figures."""

    @property
    def name(self) -> str:
        """For example `full`, `LessIsMore 256` or `LessIsMore 256, ranking mass`."""
        return f"{policy_name(self.conditions)}{self.variant}"

    @property
    def series(self) -> str:
        """The name without the budget, shared by the points of a line in a plot."""
        return f"{self.policy}{self.variant}"

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Conditions of the run."""
        return self.summary.conditions

    @property
    def is_full(self) -> bool:
        """True for full attention, the reference of all comparisons."""
        return bool(self.conditions["policy"] == FULL)

    @property
    def stops_early(self) -> bool:
        """True if the program decides how many samples a question gets: only its votes count."""
        return stops_early(self.conditions)

    @property
    def accuracy(self) -> Estimate:
        """pass@1, or the votes of a program that stops early."""
        return self.score.vote_correct if self.stops_early else self.score.pass_at_1


@dataclass(frozen=True)
class Group:
    """Runs of one model over the same questions: one table, one panel of each plot."""

    title: str
    rows: tuple[Row, ...]
    """Full attention first, then by descending budget."""

    @property
    def num_samples(self) -> int:
        """Largest number of samples a question in any run."""
        return max(row.conditions["samples"] for row in self.rows)

    @property
    def num_questions(self) -> int:
        """Smallest number of questions with samples in any run."""
        return min(row.score.num_questions for row in self.rows)

    def values(self, condition: str) -> list[Any]:
        """Return the different values of a condition in the order of the rows."""
        return _unique(row.conditions.get(condition) for row in self.rows)


@dataclass(frozen=True)
class Repeat:
    """A run that is left out, since it repeats the conditions of another one."""

    left_out: Summary
    kept: Summary

    def sentence(self, name: Callable[[Summary], str] = lambda run: run.label) -> str:
        """Return the note on the run, for a terminal or, by other names, a page.

        Args:
            name: names a run; paths of a machine are for its own terminal only.
        """
        return f"left out: {name(self.left_out)} has the same conditions as {name(self.kept)}"


def leave_out_repeats(summaries: Sequence[Summary]) -> tuple[list[Summary], list[Repeat]]:
    """Return the runs of which none repeats another's conditions, of several the one with most
    samples, or the first; and the other runs."""
    by_conditions: dict[str, list[Summary]] = {}
    for summary in summaries:
        named = sorted((k, repr(v)) for k, v in summary.conditions.items() if k not in UNNAMED)
        by_conditions.setdefault(repr(named), []).append(summary)
    kept, left_out = [], []
    for repeats in by_conditions.values():
        best = max(repeats, key=lambda each: sum(len(q.indices) for q in each.questions))
        kept.append(best)
        left_out += [Repeat(each, best) for each in repeats if each is not best]
    return kept, left_out


def make_groups(summaries: Sequence[Summary]) -> tuple[Group, ...]:
    """Group runs that can be compared.

    Raises:
        DataError: there is no run, two runs have the same conditions, or a run lacks a required
            condition or has nothing to score.
    """
    if not summaries:
        raise DataError("no run to report; name run folders, or summaries of runs")
    by_shared: dict[str, list[Summary]] = {}
    for summary in summaries:
        missing = [name for name in REQUIRED if name not in summary.conditions]
        if missing:
            raise DataError(f"{summary.label} lacks the conditions {', '.join(missing)}")
        shared = [summary.conditions.get(name) for name in SHARED]
        by_shared.setdefault(repr(shared), []).append(summary)
    members = [by_shared[key] for key in sorted(by_shared)]
    firsts = [group[0].conditions for group in members]
    titles = [", ".join(str(conditions[name]) for name in TITLE) for conditions in firsts]
    others = [name for name in SHARED if name not in TITLE]
    suffixes = _distinguish(titles, titles, firsts, others)
    return tuple(
        Group(f"{title}{suffix}", _make_rows(group))
        for title, suffix, group in zip(titles, suffixes, members, strict=True)
    )


def _make_rows(summaries: Sequence[Summary]) -> tuple[Row, ...]:
    rows = [_make_row(summary) for summary in sorted(summaries, key=_sort_key)]
    all_conditions = _unique(name for row in rows for name in row.conditions)
    later = [name for name in all_conditions if name not in (*DISTINCTIVE, *UNNAMED)]
    suffixes = _distinguish(
        [row.name for row in rows],
        [row.series for row in rows],
        [row.conditions for row in rows],
        [*DISTINCTIVE, *later],
    )
    rows = [
        replace(row, variant=row.variant + suffix)
        for row, suffix in zip(rows, suffixes, strict=True)
    ]
    for name, count in Counter(row.name for row in rows).items():
        if count > 1:
            runs = " and ".join(row.summary.label for row in rows if row.name == name)
            raise DataError(f"{runs} have the same conditions ({name}): report one of them")
    full = [row for row in rows if row.is_full]
    return tuple(_compare_with_full(row, full) for row in rows)


def _make_row(summary: Summary) -> Row:
    conditions = summary.conditions
    return Row(
        policy=policy_title(str(conditions["policy"])),
        budget=conditions.get("budget"),
        variant=_unusual(conditions),
        summary=summary,
        score=score(summary),
        note=_note(summary),
    )


def _sort_key(summary: Summary) -> tuple[Any, ...]:
    """Sort full attention first, then by descending budget, then usual variants first."""
    conditions = summary.conditions
    return (
        conditions["policy"] != FULL,
        str(conditions["policy"]),
        -(conditions.get("budget") or 0),
        _unusual(conditions),
        repr(sorted(conditions.items(), key=lambda item: item[0])),
    )


def _unusual(conditions: Mapping[str, Any]) -> str:
    """Return the conditions that every name states: another ranking, a program that stops early."""
    ranking, program = conditions.get("ranking"), conditions.get("program")
    parts = [describe("ranking", ranking)] if ranking not in (None, "rank") else []
    parts += [describe("program", program)] if stops_early(conditions) else []
    return "".join(f", {part}" for part in parts)


def _distinguish(
    names: Sequence[str],
    series: Sequence[str],
    conditions: Sequence[Mapping[str, Any]],
    candidates: Sequence[str],
) -> list[str]:
    """Return suffixes that make the names different, from the first conditions that differ.

    A condition that one member of a series needs is added to the whole series.
    """
    suffixes = [""] * len(names)
    for condition in candidates:
        current = [f"{name}{suffix}" for name, suffix in zip(names, suffixes, strict=True)]
        values = [each.get(condition) for each in conditions]
        ambiguous = {
            series[n]
            for n, name in enumerate(current)
            if any(current[m] == name and values[m] != values[n] for m in range(n))
        }
        suffixes = [
            f"{suffix}, {describe(condition, value)}" if each in ambiguous else suffix
            for suffix, value, each in zip(suffixes, values, series, strict=True)
        ]
    return suffixes


def describe(condition: str, value: object) -> str:
    """Return a condition in words: `max tokens 2,048`, `top_p 0.95`, `program adaptive`."""
    label = condition if condition in ("top_p", "top_k") else condition.replace("_", " ")
    if isinstance(value, Mapping):
        return " ".join(f"{key} {each}" for key, each in value.items()) or f"no {label}"
    if isinstance(value, str) and len(value) == 64:  # a digest
        return f"{label} {value[:8]}"
    if type(value) is int and condition != "seed":
        return f"{label} {value:,}"
    return f"no {label}" if value is None else f"{label} {value}"


def _note(summary: Summary) -> str | None:
    """Return the gaps of a run in words, None for a complete run."""
    completed = sum(bool(question.completed) for question in summary.questions)
    asked = summary.conditions["asked"]
    parts = [f"{completed:,} of {asked:,} questions"] if completed != asked else []
    parts = [summary.gap] if summary.gap else parts
    if summary.num_failed:
        parts.append(f"{counted(summary.num_failed, 'sample')} failed, not scored")
    return "; ".join(parts) or None


def _compare_with_full(row: Row, full: Sequence[Row]) -> Row:
    """Compare a row with the most similar run of full attention."""
    if row.is_full or not full:
        return row
    nearest = min(full, key=lambda other: _count_differences(row.conditions, other.conditions))
    # Named by their rows in messages, too: a report may be published, paths of a machine may not.
    a, b = (replace(each.summary, source=each.name) for each in (nearest, row))
    try:
        return replace(row, against_full=compare(a, b, names=(a.label, b.label)))
    except DataError as problem:
        parts = filter(None, (row.note, f"not compared with {nearest.name}: {problem}"))
        return replace(row, note="; ".join(parts))


def _count_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> int:
    return sum(a.get(name) != b.get(name) for name in {*a, *b} - {*POLICY, *PROVENANCE})


def _unique(values: Iterable[Any]) -> list[Any]:
    """Return the different values in order; unlike `dict.fromkeys`, also of lists and mappings."""
    unique: list[Any] = []
    for value in values:
        if value not in unique:
            unique.append(value)
    return unique
