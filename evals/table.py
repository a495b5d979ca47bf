"""The table that ends a run, and the one that compares runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lim_sglang.evals.compare import Comparison, Interval, name_of
from lim_sglang.evals.score import Estimate, Score

SHOWN_PROGRAMS = ("single", "majority")
"""Programs that draw every sample: what k of them would have answered is the whole story."""


def score_table(conditions: Mapping[str, Any], score: Score) -> Table:
    """Scores as percentages with their standard errors, under the conditions they hold for.

    Args:
        conditions: of the run's summary.
    """
    table = Table(title=describe_run(conditions), title_justify="left", title_style="bold")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("questions", str(score.num_questions))
    table.add_row("samples", str(score.num_samples))
    if conditions["program"] not in SHOWN_PROGRAMS:
        table.add_row(f"answered by {conditions['program']}", percent(score.answered))
    for k, found in score.pass_at.items():
        table.add_row(f"pass@{k}", percent(found))
    for k, found in score.majority_at.items():
        if k > 2:  # of two that differ, the first wins
            table.add_row(f"maj@{k}", percent(found))
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


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row for each run that is compared with the first."""
    table = Table(title=f"against {comparisons[0].a}", title_justify="left", title_style="bold")
    for name in ("run", "questions", "difference", "95 % interval", "right in one only", "p"):
        table.add_column(name, justify="left" if name == "run" else "right")
    table.add_column("length ratio", justify="right")
    for found in comparisons:
        table.add_row(
            found.b,
            str(found.num_questions),
            f"{100 * found.difference.value:+.1f}",
            f"{100 * found.difference.low:+.1f} to {100 * found.difference.high:+.1f}",
            f"{found.mcnemar.only_b} against {found.mcnemar.only_a}",
            f"{found.mcnemar.p:.3f}",
            ratio(found.length_ratio),
        )
    return table


def describe_run(conditions: Mapping[str, Any]) -> str:
    """Task, model and policy, in a line."""
    return f"{conditions['task']}, {conditions['model']}, {name_of(conditions)}"


def percent(estimate: Estimate) -> str:
    """`37.1 ± 1.7 %`."""
    error = "?" if estimate.error is None else f"{100 * estimate.error:.1f}"
    return f"{100 * estimate.value:.1f} ± {error} %"


def share(value: float) -> str:
    """`4.3 %`."""
    return f"{100 * value:.1f} %"


def ratio(interval: Interval) -> str:
    """`1.02 (0.99 to 1.05)`."""
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
