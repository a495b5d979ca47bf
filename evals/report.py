"""Runs put together for a report, pure: which of them share a table, what each is called in it, and
which run of full attention it is compared with.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lim_sglang.errors import DataError
from lim_sglang.evals.compare import POLICY, PROVENANCE, Comparison, Interval, compare
from lim_sglang.evals.metrics import Estimate, Score, Summary, score
from lim_sglang.evals.run_config import SAMPLE_BY_SAMPLE

FULL = "full"
POLICY_NAMES = {FULL: "full", "lessismore": "LessIsMore"}
"""As documents write them."""
USUAL = {"ranking": ("rank",), "program": SAMPLE_BY_SAMPLE}
"""What a name leaves out; of these conditions, other values are always part of it."""
SHARED = (
    *("task", "task_version", "questions", "prompt_sha256", "system_sha256", "model"),
    *("thinking", "thinking_budget", "max_tokens", "temperature", "top_p", "top_k"),
)
"""Conditions that all rows of a table share: of other values there is another table."""
TITLE = ("task", "model")
"""Those that a table is always called by; others follow where these are not enough."""
NEEDED = ("task", "model", "policy", "program", "samples", "asked", "max_tokens")
"""Without which a run cannot be shown."""


@dataclass(frozen=True)
class Row:
    """One run in a table."""

    policy: str
    budget: int | None
    """Tokens that a sparse layer reads; None: all."""
    variant: str
    """What else tells it from the other rows, behind a comma; mostly nothing."""
    summary: Summary
    score: Score
    against_full: Comparison | None = None
    """None for full attention itself, and where no run of it can be compared."""
    note: str | None = None
    """What a reader of the row has to know."""

    @property
    def name(self) -> str:
        """`full`, `LessIsMore 256`, `LessIsMore 256, ranking mass`."""
        budget = f" {self.budget:,}" if self.budget else ""
        return f"{self.policy}{budget}{self.variant}"

    @property
    def series(self) -> str:
        """What rows that differ in nothing but their budget have in common."""
        return f"{self.policy}{self.variant}"

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Of its run."""
        return self.summary.conditions

    @property
    def is_full(self) -> bool:
        """Whether the others are compared with this."""
        return bool(self.conditions["policy"] == FULL)

    @property
    def draws_all(self) -> bool:
        """Whether each question has its samples, whatever they say. Those of a program that stops
        where they agree are no fair ones: its answers speak for it.
        """
        return self.conditions["program"] in SAMPLE_BY_SAMPLE

    @property
    def accuracy(self) -> Estimate:
        """pass@1, or the answers of a program that stops by itself."""
        return self.score.pass_at_1 if self.draws_all else self.score.answered

    @property
    def difference(self) -> Interval | None:
        """To full attention: of pass@1, or of the answers if either program stops by itself."""
        found = self.against_full
        if not found:
            return None
        return found.answers if found.stops_by_itself else found.difference

    @property
    def ratio(self) -> Interval | None:
        """To full attention: of the lengths, or of the tokens a question as above."""
        found = self.against_full
        if not found:
            return None
        return found.spent_ratio if found.stops_by_itself else found.length_ratio

    @property
    def is_of_answers(self) -> bool:
        """Whether difference and ratio are those of answers."""
        return bool(self.against_full and self.against_full.stops_by_itself)


@dataclass(frozen=True)
class Group:
    """Runs of one model over the same questions: a table, and a panel in each plot."""

    title: str
    rows: tuple[Row, ...]
    """Full attention first, then by budget, the largest first."""

    @property
    def num_samples(self) -> int:
        """Most samples of a question in any run."""
        return max(row.conditions["samples"] for row in self.rows)

    def values(self, name: str) -> list[Any]:
        """Of a condition, each once, in the order of the rows."""
        found = (row.conditions.get(name) for row in self.rows)
        return _each_once(found)


def make_groups(summaries: Sequence[Summary]) -> tuple[Group, ...]:
    """Put together what can be compared.

    Raises:
        DataError: there is no run, one is given twice, or one does not say its conditions or has
            nothing to score.
    """
    if not summaries:
        raise DataError("no run to report; name run folders, or summaries of runs")
    found: dict[str, list[Summary]] = {}
    for summary in summaries:
        missing = [name for name in NEEDED if name not in summary.conditions]
        if missing:
            raise DataError(f"{summary.run_id} does not say its {', '.join(missing)}")
        shared = [summary.conditions.get(name) for name in SHARED]
        found.setdefault(repr(shared), []).append(summary)
    together = [found[key] for key in sorted(found)]
    firsts = [group[0].conditions for group in together]
    titles = [", ".join(str(conditions[name]) for name in TITLE) for conditions in firsts]
    others = [name for name in SHARED if name not in TITLE]
    told = _tell_apart(titles, titles, firsts, others)
    return tuple(
        Group(f"{title}{more}", _rows(group))
        for title, more, group in zip(titles, told, together, strict=True)
    )


def _rows(summaries: Sequence[Summary]) -> tuple[Row, ...]:
    ordered = sorted(summaries, key=_place)
    bare = [
        Row(
            policy=POLICY_NAMES.get(str(s.conditions["policy"]), str(s.conditions["policy"])),
            budget=s.conditions.get("budget"),
            variant=_unusual(s.conditions),
            summary=s,
            score=score(s),
            note=_note(s),
        )
        for s in ordered
    ]
    variants = _tell_apart(
        [row.name for row in bare],
        [row.series for row in bare],
        [row.conditions for row in bare],
        _distinguishing(ordered),
    )
    rows = [
        replace(row, variant=row.variant + more) for row, more in zip(bare, variants, strict=True)
    ]
    _refuse_twice(rows)
    full = [row for row in rows if row.is_full]
    return tuple(_compared(row, full) for row in rows)


def _refuse_twice(rows: Sequence[Row]) -> None:
    for name, count in Counter(row.name for row in rows).items():
        if count > 1:
            runs = " and ".join(row.summary.run_id for row in rows if row.name == name)
            raise DataError(f"{runs} are of the same conditions ({name}): report one of them")


def _place(summary: Summary) -> tuple[Any, ...]:
    """Full attention first, then by budget from the largest, then the usual before the others."""
    found = summary.conditions
    return (
        found["policy"] != FULL,
        str(found["policy"]),
        -(found.get("budget") or 0),
        _unusual(found),
        repr(sorted(found.items(), key=lambda item: item[0])),
    )


def _unusual(conditions: Mapping[str, Any]) -> str:
    told = [
        in_words(name, conditions.get(name))
        for name, usual in USUAL.items()
        if conditions.get(name) not in (None, *usual)
    ]
    return "".join(f", {each}" for each in told)


def _distinguishing(summaries: Sequence[Summary]) -> list[str]:
    """Conditions in the order in which they tell rows apart; when a run was made does not."""
    first = (*("select_layers", "dense_layers", "recent_ratio", "sinks"), "options", "samples")
    names = _each_once(name for summary in summaries for name in summary.conditions)
    return [*first, *(name for name in names if name not in (*first, "date", "commit"))]


def _tell_apart(
    names: Sequence[str],
    series: Sequence[str],
    conditions: Sequence[Mapping[str, Any]],
    by: Sequence[str],
) -> list[str]:
    """What to add to each name, so that none is there twice if any condition is different.

    A condition that is told of one is told of the whole series.
    """
    told = [""] * len(names)
    for condition in by:
        whole = [f"{name}{more}" for name, more in zip(names, told, strict=True)]
        values = [each.get(condition) for each in conditions]
        unclear = {
            series[n]
            for n, name in enumerate(whole)
            if any(whole[m] == name and values[m] != values[n] for m in range(n))
        }
        told = [
            f"{more}, {in_words(condition, value)}" if each in unclear else more
            for more, value, each in zip(told, values, series, strict=True)
        ]
    return told


def in_words(condition: str, value: object) -> str:
    """A condition for a reader: `max tokens 2,048`, `top_p 0.95`, `program adaptive`."""
    label = condition if condition in ("top_p", "top_k") else condition.replace("_", " ")
    if isinstance(value, Mapping):
        return " ".join(f"{key} {each}" for key, each in value.items()) or f"no {label}"
    if isinstance(value, str) and len(value) == 64:  # a digest
        return f"{label} {value[:8]}"
    if type(value) is int and condition != "seed":
        return f"{label} {value:,}"
    return f"no {label}" if value is None else f"{label} {value}"


def _note(summary: Summary) -> str | None:
    """What is missing of a run, if anything."""
    ended = sum(bool(question.whole) for question in summary.questions)
    asked = summary.conditions["asked"]
    parts = []
    if ended != asked:
        parts.append(f"{ended:,} of {asked:,} questions")
    if summary.num_failed:
        parts.append(f"{summary.num_failed:,} samples failed and are not scored")
    return "; ".join(parts) or None


def _compared(row: Row, full: Sequence[Row]) -> Row:
    """With its comparison to the run of full attention that is most like it."""
    if row.is_full or not full:
        return row
    nearest = min(full, key=lambda other: len(differing(row, other)))
    names = (nearest.name, row.name)
    try:
        return replace(row, against_full=compare(nearest.summary, row.summary, names=names))
    except DataError as problem:
        parts = filter(None, (row.note, f"not compared with {nearest.name}: {problem}"))
        return replace(row, note="; ".join(parts))


def differing(row: Row, other: Row) -> list[str]:
    """Conditions besides the policy's that two runs do not share."""
    names = {*row.conditions, *other.conditions} - {*POLICY, *PROVENANCE}
    return sorted(n for n in names if row.conditions.get(n) != other.conditions.get(n))


def _each_once(values: Iterator[Any] | Sequence[Any]) -> list[Any]:
    """In order; lists and mappings among them cannot be hashed."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
