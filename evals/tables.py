"""A report's tables, pure: what each cell says, the tables as Markdown, and their section of a
README.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lim_sglang.evals.compare import MINUS, Interval
from lim_sglang.evals.metrics import Estimate
from lim_sglang.evals.report import Group, Row, in_words
from lim_sglang.markdown_section import Part, short_commit

NONE = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
ROW_TITLE = "policy and budget"
MOST_CONTESTED = 20


@dataclass(frozen=True)
class Column:
    """One measure, from a row to what its cell says."""

    title: str
    cell: Callable[[Row], str]
    in_readme: bool = True
    """Whether it is worth its width there."""


def columns(group: Group) -> tuple[Column, ...]:
    """The measures of one table; those of several samples, or of programs that stop by themselves,
    where there are any.
    """
    k = most_common_k(group)
    several = (
        Column(vote_title(group), lambda row: percent(row.score.answered)),
        Column(f"pass@{k}, %", lambda row: percent(_if_fair(row, row.score.pass_at.get(k)))),
    )
    spent = Column("tokens a question", lambda row: whole(row.score.tokens_per_question))
    return (
        Column("pass@1, %", lambda row: percent(_if_fair(row, row.score.pass_at_1))),
        *(several if group.num_samples > 1 else ()),
        Column("difference to full, points (95 %)", _difference),
        Column("McNemar p", _p_value),
        Column("cut off, %", lambda row: share(row.score.truncated)),
        Column("no answer, %", lambda row: share(row.score.answerless), in_readme=False),
        Column("mean tokens", lambda row: whole(row.score.mean_tokens)),
        *(() if all(row.draws_all for row in group.rows) else (spent,)),
        Column("length ratio (95 %)", _length_ratio),
        Column("tokens per correct", lambda row: whole(row.score.tokens_per_correct)),
    )


def most_common_k(group: Group) -> int:
    """The largest k for which every run that draws all its samples has pass@k."""
    found = [set(row.score.pass_at) for row in group.rows if row.draws_all]
    return max(set.intersection(*found)) if found else 1


def _if_fair(row: Row, estimate: Estimate | None) -> Estimate | None:
    """Nothing for a program that stops by itself: it has many samples of hard questions only."""
    return estimate if row.draws_all else None


def vote_title(group: Group) -> str:
    """`maj@4, %` where all runs vote alike, otherwise no more than that there is a vote."""
    numbers = group.values("samples")
    alike = len(numbers) == 1 and all(row.draws_all for row in group.rows)
    return f"maj@{numbers[0]}, %" if alike else "vote right, %"


def percent(estimate: Estimate | None) -> str:
    """`38.5 ± 1.6`, with one standard error."""
    if estimate is None:
        return NONE
    error = "?" if estimate.error is None else f"{100 * estimate.error:.1f}"
    return f"{100 * estimate.value:.1f} {PLUS_MINUS} {error}"


def points(found: Interval) -> str:
    """`+1.1 (+0.2 to +2.0)`."""
    return f"{signed(found.value)} ({to(found)})"


def to(found: Interval) -> str:
    """The interval's ends in points."""
    return f"{signed(found.low)} to {signed(found.high)}"


def signed(value: float) -> str:
    """Points of a hundred, with their sign; nothing is neither more nor less."""
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def share(value: float) -> str:
    """In percent."""
    return f"{100 * value:.1f}"


def whole(value: float | None) -> str:
    """`1,403`."""
    return NONE if value is None else f"{value:,.0f}"


def p_value(p: float) -> str:
    """With as many places as mean something."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def _difference(row: Row) -> str:
    if not row.difference:
        return NONE
    return f"{points(row.difference)}{', answers' if row.is_of_answers else ''}"


def _p_value(row: Row) -> str:
    return p_value(row.against_full.mcnemar.p) if row.against_full else NONE


def _length_ratio(row: Row) -> str:
    if not row.ratio:
        return NONE
    text = f"{row.ratio.value:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})"
    return f"{text}, a question" if row.is_of_answers else text


def markdown(group: Group) -> str:
    """The table as a README has it."""
    shown = [column for column in columns(group) if column.in_readme]
    head = [ROW_TITLE, *(column.title for column in shown)]
    lines = [head, ["---", *["---:"] * len(shown)]]
    lines += [[row.name, *(column.cell(row) for column in shown)] for row in group.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class Contested:
    """A question that the runs of a table do not agree on."""

    question_id: str
    counts: tuple[str, ...]
    """Right samples of those that ended, for each row."""
    shares: tuple[float | None, ...]
    """The same as a share; None where none ended."""

    @property
    def spread(self) -> float:
        """Between the best row and the worst."""
        found = [each for each in self.shares if each is not None]
        return max(found) - min(found) if found else 0.0


def contested(rows: Sequence[Row], most: int = MOST_CONTESTED) -> list[Contested]:
    """The questions whose verdicts differ most between runs, by that and then by their ids."""
    asked: dict[str, None] = {}
    for row in rows:
        asked |= dict.fromkeys(question.question_id for question in row.summary.questions)
    results = [{q.question_id: q for q in row.summary.questions} for row in rows]
    found = []
    for identity in asked:
        each = [result.get(identity) for result in results]
        counts = [
            f"{sum(q.correct[n] for n in q.whole)} of {len(q.whole)}" if q else NONE for q in each
        ]
        shares = [q.share_correct if q else None for q in each]
        found.append(Contested(identity, tuple(counts), tuple(shares)))
    differing = [question for question in found if question.spread > 0]
    return sorted(differing, key=lambda question: (-question.spread, question.question_id))[:most]


def listed(values: Iterable[object]) -> str:
    """`a, b and c`."""
    *head, last = map(str, values)
    return f"{', '.join(head)} and {last}" if head else last


PART = Part("<!-- lim report: begin -->", "<!-- lim report: end -->")
NOT_MEASURED = "Accuracy: not measured yet."
TIMES = "\N{MULTIPLICATION SIGN}"
METHOD = (
    f"{PLUS_MINUS} is one standard error, clustered by question. Differences are of pass@1, paired "
    "by question, with 95 % intervals by bootstrap over questions, not corrected for their number; "
    "McNemar's exact test compares the votes. Cut off: samples that reached the limit of new "
    "tokens. Length ratios are to full; tokens per correct counts all that was generated."
)
STOPPING = (
    "Programs that stop by themselves have more samples where these disagree, so that they are "
    "judged by their answers and by the tokens of a question."
)
PACKAGES = {"sglang_server": "SGLang", "torch": "torch", "math_verify": "Math-Verify"}
"""Versions that are named, by their names among the conditions."""


def make_section(groups: Sequence[Group], plot: str | None = None) -> str:
    """Tables in Markdown, each with its conditions.

    Args:
        plot: where the README finds the plot of accuracy against budget.
    """
    if not groups:
        return NOT_MEASURED
    parts = [f"{markdown(group)}\n\n{group.title}: {conditions(group)}" for group in groups]
    picture = [f"![Accuracy against budget]({plot})"] if plot else []
    return "\n\n".join([*parts, method(groups), *picture])


def method(groups: Sequence[Group]) -> str:
    """How the figures of tables came about."""
    fair = all(row.draws_all for group in groups for row in group.rows)
    return METHOD if fair else f"{METHOD} {STOPPING}"


def conditions(group: Group) -> str:
    """What the figures of one table hold for, in a sentence or two."""
    how = [
        f"{_counted(group, 'asked', 'question')} {TIMES} {_counted(group, 'samples', 'sample')}",
        f"at most {_all(group, 'max_tokens')} new tokens",
        *(in_words(name, group.values(name)[0]) for name in ("temperature", "top_p", "top_k")),
    ]
    made = [_all(group, "device_name"), *versions(group.values("versions"))]
    commits = listed(map(short_commit, group.values("commit")))
    days = listed(sorted(map(str, group.values("date"))))
    notes = "".join(f" {row.name}: {row.note}." for row in group.rows if row.note)
    return f"{', '.join(how)}; {', '.join(made)}. By `lim eval` on {days}, commit {commits}.{notes}"


def _all(group: Group, name: str) -> str:
    """The values of a condition that the rows may not share."""
    unknown = f"unknown {name.replace('_', ' ')}"
    found = group.values(name)
    return listed(f"{each:,}" if type(each) is int else each or unknown for each in found)


def _counted(group: Group, name: str, what: str) -> str:
    return f"{_all(group, name)} {what}{'' if group.values(name) == [1] else 's'}"


def versions(found: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """`SGLang 0.5.16`, and so on; several where runs differ."""
    texts = []
    each_run = [versions or {} for versions in found]
    for name, shown in PACKAGES.items():
        known = dict.fromkeys(str(each[name]) for each in each_run if each.get(name))
        if known:
            texts.append(f"{shown} {listed(known)}")
    return texts
