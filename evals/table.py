"""The table that ends a run, and the one that compares runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from lim_sglang.evals.compare import MINUS, Comparison, Interval, name_of
from lim_sglang.evals.metrics import Estimate, Score
from lim_sglang.evals.run_config import SAMPLE_BY_SAMPLE


def score_table(conditions: Mapping[str, Any], score: Score) -> Table:
    """Scores as percentages with their standard errors, under the conditions they hold for.

    Args:
        conditions: of the run's summary.
    """
    table = Table(
        title=describe_run(conditions),
        title_justify="left",
        title_style="bold",
        caption=describe_sampling(conditions),
        caption_justify="left",
        min_width=60,
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("questions", str(score.num_questions))
    table.add_row("samples", str(score.num_samples))
    if conditions["program"] in SAMPLE_BY_SAMPLE:
        for k, found in score.pass_at.items():
            table.add_row(f"pass@{k}{_of_fewer(score, k)}", percent(found))
        for k, found in score.majority_at.items():
            if k > 2:  # of two that differ, the first wins
                table.add_row(f"maj@{k}{_of_fewer(score, k)}", percent(found))
    else:
        table.add_row(f"answered by {conditions['program']}", percent(score.answered))
        table.add_row("pass@1 of what was drawn", percent(score.pass_at_1))
    table.add_row("truncated", share(score.truncated))
    table.add_row("without answer", share(score.answerless))
    if score.aborted:
        table.add_row("aborted early", share(score.aborted))
    table.add_row("mean tokens", f"{score.mean_tokens:,.0f}")
    for number, length in score.percentiles.items():
        table.add_row(f"tokens, {number} % are within", f"{length:,.0f}")
    table.add_row("tokens a question", f"{score.tokens_per_question:,.0f}")
    if score.tokens_per_correct is not None:
        table.add_row("tokens a right sample", f"{score.tokens_per_correct:,.0f}")
    table.add_row("failed, not scored", str(score.num_failed))
    return table


def _of_fewer(score: Score, k: int) -> str:
    """How many questions have k samples, where not all that are scored do."""
    count = score.questions_at[k]
    return f", {count} questions" if count < score.questions_at[1] else ""


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One column for each run that is compared with the first; 95 % intervals in parentheses."""
    table = Table(title=f"against {comparisons[0].a}", title_justify="left", title_style="bold")
    table.add_column("measure")
    rows: dict[str, Callable[[Comparison], str]] = {
        "questions": lambda found: str(found.num_questions),
        "pass@1, points": lambda found: points(found.difference),
        "answers, points": lambda found: points(found.answers),
        "answered by it only": lambda found: str(found.mcnemar.only_b),
        "by the first only": lambda found: str(found.mcnemar.only_a),
        "McNemar's p": lambda found: p_value(found.mcnemar.p),
        "length of samples": lambda found: ratio(found.length_ratio),
        "tokens a question": lambda found: ratio(found.spent_ratio),
    }
    for found in comparisons:
        table.add_column(found.b, justify="right")
    for name, cell in rows.items():
        table.add_row(name, *map(cell, comparisons))
    return table


def describe_run(conditions: Mapping[str, Any]) -> str:
    """Task, model and policy, in a line."""
    return f"{conditions['task']}, {conditions['model']}, {name_of(conditions)}"


def describe_sampling(conditions: Mapping[str, Any]) -> str:
    """How the samples were drawn, and on what."""
    said = {
        "samples": conditions.get("samples"),
        "at most": conditions.get("max_tokens"),
        **{name: conditions.get(name) for name in ("temperature", "top_p", "top_k")},
    }
    parts = [f"{name} {value}" for name, value in said.items() if value is not None]
    return ", ".join([*parts, *filter(None, [conditions.get("device_name")])])


def percent(estimate: Estimate) -> str:
    """`37.1 ± 1.7 %`."""
    error = "?" if estimate.error is None else f"{100 * estimate.error:.1f}"
    return f"{100 * estimate.value:.1f} ± {error} %"


def share(value: float) -> str:
    """`4.3 %`."""
    return f"{100 * value:.1f} %"


def points(interval: Interval) -> str:
    """`+1.2 (+0.3 to +2.1)`, with real minus signs."""
    value, low, high = (
        f"{100 * each:+.1f}".replace("-", MINUS)
        for each in (interval.value, interval.low, interval.high)
    )
    return f"{value} ({low} to {high})"


def p_value(p: float) -> str:
    """`0.041`, and no zero for what is only rare."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def ratio(interval: Interval) -> str:
    """`1.02 (0.99 to 1.05)`."""
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
