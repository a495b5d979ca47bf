"""The table that ends a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lim_sglang.evals.score import Estimate, Score
from lim_sglang.evals.settings import describe_policy


def score_table(settings: Mapping[str, Any], score: Score, num_failed: int) -> Table:
    """Scores as percentages with their standard errors, under the conditions they hold for.

    Args:
        settings: of the run, as in its `run.json`.
        num_failed: samples that are missing because the server failed them.
    """
    wanted = settings["num_samples"]
    table = Table(title=describe_run(settings), title_justify="left", title_style="bold")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("questions", str(score.num_questions))
    table.add_row("samples", str(score.num_samples))
    table.add_row("pass@1", _percent(score.pass_at_1))
    table.add_row(f"maj@{wanted}", _percent(score.majority))
    table.add_row("truncated", f"{100 * score.truncated:.1f} %")
    table.add_row("without answer", f"{100 * score.answerless:.1f} %")
    table.add_row("mean tokens", f"{score.mean_tokens:.0f}")
    table.add_row("failed, not scored", str(num_failed))
    return table


def describe_run(settings: Mapping[str, Any]) -> str:
    """Task, model and policy, in a line."""
    model = str(settings["server"]["model_path"]).rstrip("/").rpartition("/")[2]
    return f"{settings['task']}, {model}, {describe_policy(settings)}"


def _percent(estimate: Estimate) -> str:
    error = "?" if estimate.error is None else f"{100 * estimate.error:.1f}"
    return f"{100 * estimate.value:.1f} ± {error} %"
