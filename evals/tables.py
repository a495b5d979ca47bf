"""Figures in words: the formatters, and all tables of scores and comparisons.

A table has the same cells on a terminal, in Markdown and in the HTML page.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lim_sglang.evals.compare import (
    Comparison,
    Interval,
    policy_name,
    uneven_seconds,
)
from lim_sglang.evals.equal_time import EqualTime
from lim_sglang.evals.metrics import (
    MIN_QUESTIONS,
    MIN_VOTERS,
    NO_MAJORITY,
    Estimate,
    PastBudget,
    QuestionResult,
    Score,
    stops_early,
)
from lim_sglang.evals.pairing import natural_order
from lim_sglang.evals.report import Group, Row
from lim_sglang.markdown_section import counted, markdown_table
from lim_sglang.programs.schema import UNANSWERED, copies_note, cut_off_advice
from lim_sglang.progress import print_plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
ALL_READ = "no sample grew past the budget, so every step read everything"
SAYS_NOTHING = "both runs read everything, so the comparison says nothing about sparse attention"
TIMES = "\N{MULTIPLICATION SIGN}"
RIGHT_VOTES = "right votes"
PASS_OF_TAKEN = "pass@1 of the samples taken"
TOKENS_PER_RIGHT = "tokens a right sample"
SECONDS = "seconds a sample"


def percent(estimate: Estimate | None) -> str:
    """Return `38.5 ± 1.6`: percent with one standard error, if there is one."""
    if estimate is None:
        return NONE
    error = "" if estimate.error is None else f" {PLUS_MINUS} {share(estimate.error)}"
    return f"{share(estimate.value)}{error}"


def share(value: float) -> str:
    """Return a share from 0 to 1 in percent, such as `4.5`."""
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """Return a difference of shares in percentage points: `+1.1`, or `0.0` without a sign."""
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def points(interval: Interval) -> str:
    """Return `+1.1 (+0.2 to +2.0)`, without the brackets if there is no interval."""
    return f"{signed(interval.value)}{_bounds(interval, signed)}"


def ratio(interval: Interval) -> str:
    """Return `1.02 (0.99 to 1.05)`, without the brackets if there is no interval."""
    return f"{interval.value:.2f}{_bounds(interval, '{:.2f}'.format)}"


def _bounds(interval: Interval, form: Callable[[float], str]) -> str:
    return f" ({' to '.join(map(form, interval.bounds))})" if interval.bounds else ""


def past_budget(found: PastBudget | None) -> str:
    """Return `3 of 12`, or `at least 3 of 12` where prompts were not counted."""
    if found is None:
        return NONE
    least = "" if found.is_exact else "at least "
    return f"{least}{found.count:,} of {found.num_samples:,}"


def past_budget_cell(found: PastBudget | None) -> str:
    """Return `3 of 12 (87.1 % of tokens read)`: the share that sparse layers read, if known."""
    read = None if found is None else found.read_share
    return past_budget(found) + ("" if read is None else f" ({share(read)} % of tokens read)")


def too_few(num_questions: int) -> str:
    """Return why the figures of some questions have no standard error and no interval."""
    are = "question is" if num_questions == 1 else "questions are"
    return (
        f"{num_questions} {are} too few for standard errors and intervals, which need "
        f"{MIN_QUESTIONS}"
    )


def number(value: float | None) -> str:
    """Return `1,403`."""
    return NONE if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Return `8.2`."""
    return NONE if value is None else f"{value:,.1f}"


def p_value(p: float, decimals: int = 2) -> str:
    """Return `0.38`, `0.041` or `< 0.001`: `decimals` from 0.1 on, three below."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.{decimals if p >= 0.1 else 3}f}"


def measure(row: Row) -> str:
    """Return the name of `Row.accuracy`."""
    return RIGHT_VOTES if row.stops_early else "pass@1"


def sentence(found: Comparison) -> str:
    """Return in one sentence which differences the data show and which ones they exclude."""
    grown, reservations = _past_budgets(found), [failures(found), *_gaps(found)]
    if found.reads_everything:
        few = "" if found.headline_difference.bounds else too_few(found.num_questions)
        return _sentences(f"{grown}: {SAYS_NOTHING}", few, _unanswered(found), *reservations)
    difference, tokens = found.headline_difference, found.headline_ratio
    measured = f"share of {RIGHT_VOTES}" if found.stops_by_itself else "pass@1"
    size = share(abs(difference.value))
    relation = f"{size} points {'above' if difference.value > 0 else 'below'}"
    if size == "0.0":
        relation = "equal to"
    result = f"The {measured} of {found.b} is {relation} that of {found.a}{_support(found)}"
    times = f"{tokens.value:.2f} times as"
    cost = f"samples are {times} long"
    if found.stops_by_itself:
        cost = f"questions take {times} many tokens"
    result = f"{result}; {cost}{_bounds(tokens, '{:.2f}'.format)}"
    return _sentences(result, grown, _unanswered(found), *reservations)


def _sentences(*texts: str) -> str:
    return " ".join(f"{text}." for text in texts if text)


def _gaps(found: Comparison) -> list[str]:
    """Return the missing part of each run that is not complete."""
    runs = ((found.a, found.figures_a), (found.b, found.figures_b))
    return [f"{name}: {figures.gap}" for name, figures in runs if figures.gap]


def _unanswered(found: Comparison) -> str:
    """Return the shares of samples without an answer; empty where the runs have similar ones."""
    if not found.answers_differ_in_number:
        return ""
    return (
        f"{share(found.figures_a.no_answer)} % of the samples of {found.a} and "
        f"{share(found.figures_b.no_answer)} % of those of {found.b} have no answer that could be "
        "read, and count as wrong"
    )


def failures(found: Comparison) -> str:
    """Return how many samples of each run failed and what follows; empty where none did."""
    if not found.has_failures:
        return ""
    return (
        f"{counted(found.figures_a.failed, 'sample')} of {found.a} and {found.figures_b.failed:,} "
        f"of {found.b} failed and are left out: long samples fail first, by timeouts for example, "
        "so scores and lengths are biased (lim eval --retry-failed tries them again)"
    )


def _support(found: Comparison) -> str:
    """Return the interval of the difference and what it shows, as the rest of a sentence."""
    difference = found.headline_difference
    if difference.bounds is None:
        return f", but {too_few(found.num_questions)}"
    low, high = difference.bounds
    interval = f" (95 % interval {signed(low)} to {signed(high)})"
    if difference.excludes_zero:
        return f"{interval}: the data show a {'gain' if difference.value > 0 else 'loss'}"
    return (
        f"{interval}: the data do not show a difference, and exclude a loss of more than "
        f"{share(max(0.0, -low))} points and a gain of more than {share(max(0.0, high))}"
    )


def _past_budgets(found: Comparison) -> str:
    """Return how many samples of each sparse run grew past its budget; empty without one."""
    runs = ((found.a, found.past_budget_a), (found.b, found.past_budget_b))
    text = ", ".join(
        f"{past_budget(each)} samples of {name} grew past the budget of {each.budget:,}"
        for name, each in runs
        if each
    )
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Table:
    """The cells of a table."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    caption: str = ""

    def __rich__(self) -> "RichTable":
        """Return the cells as rich's console prints them."""
        from rich.table import Table as RichTable
        from rich.text import Text  # shows names as they are, brackets and colons among them

        table = RichTable()
        for n, name in enumerate(self.head):
            table.add_column(Text(name), justify="right" if n else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def flipped(self) -> "Table":
        """Return the table with its columns as rows."""
        head, *rows = zip(self.head, *self.rows, strict=True)
        return replace(self, head=head, rows=tuple(rows))

    def markdown(self) -> str:
        """Return the table in Markdown, without title and caption."""
        return markdown_table(self.head, self.rows)


def print_table(console: "Console", table: Table) -> None:
    """Print title and caption, then the cells: columns as rows where a terminal is too narrow;
    elsewhere the lines are as long as they need to be.
    """
    for line in filter(None, (table.title, table.caption)):
        print_plain(console, line)
    width = _natural_width(console, table)
    if not console.is_terminal:
        console.width = max(width, console.width)
    console.print(table.flipped() if width > console.width else table)


def _natural_width(console: "Console", table: Table) -> int:
    """Return the columns that a table takes without a break in a cell."""
    from rich.measure import Measurement

    roomy = console.options.update(width=10_000)
    return Measurement.get(console, roomy, table.__rich__()).maximum


def score_table(conditions: Mapping[str, Any], score: Score) -> Table:
    """Return the scores of one run, with its conditions in title and caption."""
    program = conditions["program"]
    rows = [("questions", str(score.num_questions)), ("samples", str(score.num_samples))]
    notes = [_sampling_conditions(conditions)]
    if stops_early(conditions):
        rows += [
            (f"{RIGHT_VOTES} by {program}", f"{percent(score.vote_correct)} %"),
            (PASS_OF_TAKEN, f"{percent(score.pass_at_1)} %"),
        ]
    else:
        rows += [
            (f"pass@{k}{_fewer_questions(score, k)}", f"{percent(found)} %")
            for k, found in score.pass_at.items()
        ]
        rows += [
            (f"{RIGHT_VOTES} of {k}{_fewer_questions(score, k)}", f"{percent(found)} %")
            for k, found in score.majority_at.items()
            if k >= MIN_VOTERS
        ]
    copies = copies_note(conditions, conditions["samples"])
    notes += [copies] if copies else []
    notes += [] if score.has_majority else [NO_MAJORITY]
    rows += [
        ("cut off", f"{share(score.truncated)} %"),
        ("no answer", f"{share(score.no_answer)} %"),
    ]
    if score.aborted:
        rows.append(("aborted early", f"{share(score.aborted)} %"))
    rows.append(("mean tokens", number(score.mean_tokens)))
    rows += [
        (f"tokens, {percentile} % are within", number(tokens))
        for percentile, tokens in score.percentiles.items()
    ]
    rows.append(("tokens a question", number(score.tokens_per_question)))
    if score.tokens_per_correct is not None:
        rows.append((TOKENS_PER_RIGHT, number(score.tokens_per_correct)))
    if score.mean_seconds is not None:
        rows.append((SECONDS, seconds(score.mean_seconds)))
    rows.append(("failed, not scored", str(score.num_failed)))
    if grown := score.past_budget:
        rows.append((f"grew past the budget of {grown.budget:,}", past_budget_cell(grown)))
        notes += [ALL_READ] if grown.is_none else []
    if score.num_questions < MIN_QUESTIONS:
        notes.append(too_few(score.num_questions))
    return Table(
        head=("measure", "value"),
        rows=tuple(rows),
        title=f"{conditions['task']}, {conditions['model']}, {policy_name(conditions)}",
        caption="; ".join(notes),
    )


def reasons_without_answer(conditions: Mapping[str, Any], score: Score) -> Iterator[str]:
    """Yield a line for each reason why samples of a run have no answer, with the way to mend it."""
    of = f"of {counted(score.num_samples, 'sample')}"
    if score.num_cut_off:
        cut_off = round(score.truncated * score.num_samples)
        were = "was" if cut_off == 1 else "were"
        of_them = f", {score.num_cut_off:,} of them" if score.num_cut_off < cut_off else ""
        longest = score.longest_cut_off
        advice = cut_off_advice(longest, conditions["max_tokens"], "serve a longer context")
        yield (
            f"{cut_off:,} {of} {were} cut off{of_them} with no answer, after at most {longest:,} "
            f"tokens: {advice}"
        )
    if score.num_unanswered:
        yield (
            f"{score.num_unanswered:,} {of} {UNANSWERED}; "
            "each question has to have one short result"
        )


def _fewer_questions(score: Score, k: int) -> str:
    """Return the number of questions with k samples, if others have fewer."""
    count = score.questions_at[k]
    return f", {counted(count, 'question')}" if count < score.questions_at[1] else ""


def _sampling_conditions(conditions: Mapping[str, Any]) -> str:
    labels = {"samples": "samples", "max_tokens": "at most"}
    labels |= {name: name for name in ("temperature", "top_p", "top_k")}
    known = [(label, conditions.get(name)) for name, label in labels.items()]
    parts = [f"{label} {value}" for label, value in known if value is not None]
    return ", ".join([*parts, *filter(None, [conditions.get("device_name")])])


def comparison_table(found: Comparison) -> Table:
    """Return both runs' figures and their differences; ratios are those of the second to the first.

    Votes are left out where they are of two samples, and the ratio of seconds where the runs'
    loads differ; the caption says so.
    """
    a, b = found.figures_a, found.figures_b
    num = str(found.num_questions)
    rows: list[tuple[str, ...]]
    rows = [("questions", num, num, ""), ("samples", f"{a.completed:,}", f"{b.completed:,}", "")]
    if found.has_failures:
        rows.append(("failed, left out", f"{a.failed:,}", f"{b.failed:,}", ""))
    taken = PASS_OF_TAKEN if found.stops_by_itself else "pass@1"
    rows.append(_shares_row(taken, a.pass_at_1, b.pass_at_1, found.difference))
    if found.has_majority:
        only = found.mcnemar
        p = f"McNemar p {p_value(only.p, decimals=3)}" if found.answers.bounds else ""
        rows += [
            _shares_row(RIGHT_VOTES, a.right_votes, b.right_votes, found.answers),
            (f"{RIGHT_VOTES} of this run only", str(only.only_a), str(only.only_b), p),
        ]
    rows += [
        _shares_row("no answer", a.no_answer, b.no_answer),
        _shares_row("cut off", a.cut_off, b.cut_off),
    ]
    if found.past_budget_a or found.past_budget_b:
        grown = map(past_budget_cell, (found.past_budget_a, found.past_budget_b))
        rows.append(("grew past the budget", *grown, ""))
    lengths, spent = found.length_ratio, found.spent_ratio
    rows += [
        _tokens_row("mean tokens of a sample", a.mean_tokens, b.mean_tokens, lengths),
        _tokens_row("tokens a question", a.tokens_per_question, b.tokens_per_question, spent),
    ]
    if a.mean_seconds is not None or b.mean_seconds is not None:
        times = f"{TIMES} {ratio(found.seconds_ratio)}" if found.seconds_ratio else ""
        rows.append((SECONDS, seconds(a.mean_seconds), seconds(b.mean_seconds), times))
    notes = ["" if found.has_majority else NO_MAJORITY, found.uneven_seconds]
    level = " (95 %)" if found.difference.bounds else ""
    head = ("measure", found.a, found.b, f"difference{level}")
    return Table(head, tuple(rows), f"{found.b} against {found.a}", "; ".join(filter(None, notes)))


def equal_time_table(found: Comparison, rows: Sequence[EqualTime]) -> Table:
    """Return the votes of both runs at equal seconds, a row for each time."""
    level = ", 95 %" if any(row.difference.bounds for row in rows) else ""
    names = (found.a, found.b)
    columns = [f"{what}, {name}" for what in ("samples", f"{RIGHT_VOTES} %") for name in names]
    head = ("seconds", *columns, f"difference, points{level}")
    cells = tuple(
        (
            *(seconds(row.seconds), str(row.samples_a), str(row.samples_b)),
            *(share(row.majority_a), share(row.majority_b), points(row.difference)),
        )
        for row in rows
    )
    return Table(head, cells, f"{found.b} against {found.a} at equal time")


def _shares_row(
    name: str, a: float, b: float, difference: Interval | None = None
) -> tuple[str, ...]:
    """Return two shares and their difference in percentage points."""
    difference = difference or Interval(b - a)
    text = f"{signed(difference.value)} points{_bounds(difference, signed)}"
    return name, f"{share(a)} %", f"{share(b)} %", text


def _tokens_row(name: str, a: float, b: float, quotient: Interval) -> tuple[str, ...]:
    return name, number(a), number(b), f"{TIMES} {ratio(quotient)}"


def group_table(group: Group) -> Table:
    """Return one row for each run of a group: the same columns on a terminal, in Markdown and in
    the HTML page.

    Columns for several samples a question, for votes, for budgets, for seconds or for programs that
    stop early are left out if no run needs them.
    """
    k = _largest_common_k(group)
    any_stops_early = any(row.stops_early for row in group.rows)
    any_majority = any(row.score.has_majority for row in group.rows)
    any_budget = any(row.score.past_budget for row in group.rows)
    any_seconds = any(row.score.mean_seconds is not None for row in group.rows)
    columns: list[tuple[str, bool, Callable[[Row], str]]] = [
        ("pass@1, %", True, lambda row: percent(_pass_at(row, 1))),
        (f"{RIGHT_VOTES}, %", group.num_samples > 1 and any_majority, _vote_cell),
        (f"pass@{k}, %", k > 1, lambda row: _pass_cell(row, k)),
        ("difference to full, points (95 %)", True, difference_cell),
        ("McNemar p", any_majority and group.num_questions >= MIN_QUESTIONS, _p_cell),
        ("cut off, %", True, lambda row: share(row.score.truncated)),
        ("no answer, %", True, lambda row: share(row.score.no_answer)),
        ("grew past the budget", any_budget, lambda row: past_budget_cell(row.score.past_budget)),
        ("mean tokens", True, lambda row: number(row.score.mean_tokens)),
        (SECONDS, any_seconds, lambda row: seconds(row.score.mean_seconds)),
        (
            "tokens a question",
            any_stops_early,
            lambda row: number(row.score.tokens_per_question),
        ),
        ("length ratio (95 %)", True, ratio_cell),
        (TOKENS_PER_RIGHT, True, lambda row: number(row.score.tokens_per_correct)),
    ]
    shown = [(title, cell) for title, is_shown, cell in columns if is_shown]
    return Table(
        head=("policy and budget", *(title for title, _ in shown)),
        rows=tuple((row.name, *(cell(row) for _, cell in shown)) for row in group.rows),
    )


def seconds_note(group: Group) -> str:
    """Return why the seconds of a group's rows do not compare; empty where they do, and where fewer
    than two rows have them.
    """
    rows = [row for row in group.rows if row.score.mean_seconds is not None]
    return uneven_seconds({row.name: row.conditions for row in rows}) if len(rows) > 1 else ""


def _largest_common_k(group: Group) -> int:
    """Return the largest k for which every run that takes all its samples has pass@k."""
    ks = [set(row.score.pass_at) for row in group.rows if not row.stops_early]
    return max(set.intersection(*ks)) if ks else 1


def _pass_at(row: Row, k: int) -> Estimate | None:
    """Return pass@k; None for a program that stops early, whose samples are a biased selection."""
    return None if row.stops_early else row.score.pass_at.get(k)


def _pass_cell(row: Row, k: int) -> str:
    """Return pass@k, with the number of its questions if others have fewer samples."""
    found = _pass_at(row, k)
    few = _fewer_questions(row.score, k) if found else ""
    return f"{percent(found)}{few}"


def _vote_cell(row: Row) -> str:
    return percent(row.score.vote_correct if row.score.has_majority else None)


def difference_cell(row: Row) -> str:
    """Return the headline difference of a row to full attention, in points."""
    if not row.against_full or row.against_full.reads_everything:
        return NONE
    votes = ", answers" if row.against_full.stops_by_itself else ""
    return f"{points(row.against_full.headline_difference)}{votes}"


def _p_cell(row: Row) -> str:
    found = row.against_full
    if not found or found.reads_everything or not found.has_majority:
        return NONE
    return p_value(found.mcnemar.p)


def ratio_cell(row: Row) -> str:
    """Return the headline ratio of tokens of a row to full attention."""
    if not row.against_full or row.against_full.reads_everything:
        return NONE
    votes = ", a question" if row.against_full.stops_by_itself else ""
    return f"{ratio(row.against_full.headline_ratio)}{votes}"


MAX_DISAGREEMENTS = 20


def disagreement_table(rows: Sequence[Row], most: int = MAX_DISAGREEMENTS) -> Table:
    """Return the questions whose share of correct samples differs most between runs.

    Each cell counts the correct samples; the largest difference comes first, then the smaller id.
    """
    spread: dict[str, float] = {}
    for name, found in _by_question(rows).items():
        known = [q.share_correct for q in found if q and q.share_correct is not None]
        spread[name] = max(known) - min(known) if known else 0.0
    differing = sorted((n for n in spread if spread[n]), key=lambda n: (-spread[n], n))
    return _question_table(rows, differing[:most])


def question_table(rows: Sequence[Row]) -> Table:
    """Return every question, in the order of their ids, with its correct samples."""
    return _question_table(rows, sorted(_by_question(rows), key=natural_order))


def _by_question(rows: Sequence[Row]) -> dict[str, list[QuestionResult | None]]:
    """Return the results of each question in all runs; None where a run lacks it."""
    runs = [{q.question_id: q for q in row.summary.questions} for row in rows]
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: [run.get(name) for run in runs] for name in names}


def _question_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    results = _by_question(rows)
    return Table(
        head=("question id", *(row.name for row in rows)),
        rows=tuple((name, *map(_correct_cell, results[name])) for name in names),
    )


def _correct_cell(question: QuestionResult | None) -> str:
    return f"{question.num_correct} of {len(question.completed)}" if question else NONE


def condition_table(group: Group) -> Table:
    """Return every condition of a group's runs, one cell where all runs agree.

    A condition with parts, such as the versions, has a row for each part.
    """
    runs = [dict(_flatten({"run": r.summary.run_id, **r.conditions})) for r in group.rows]
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run):
        cells = [_condition_cell(run.get(name)) for run in runs]
        rows.append((name, *(cells[:1] if len(set(cells)) == 1 else cells)))
    return Table(head=("condition", *(row.name for row in group.rows)), rows=tuple(rows))


def _flatten(conditions: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in conditions.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _condition_cell(value: object) -> str:
    if value is None or value == {}:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NONE
    return f"{value:,}" if isinstance(value, int) else str(value)
