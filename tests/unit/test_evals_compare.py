"""Two runs against each other: pairs, intervals, McNemar's test, what may be said."""

import json
import random
from pathlib import Path

import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from lim_sglang.cli import app
from lim_sglang.errors import DataError
from lim_sglang.evals.compare import Interval, bootstrap, compare, mcnemar, sentence
from lim_sglang.evals.summary import Summary, write_summary
from lim_sglang.programs.records import SampleState
from tests.unit.results import result, summary


def run_of(*shares: tuple[int, int], policy: str = "full", length: int = 100) -> Summary:
    """Questions with so many right of so many samples; the vote is right where most are."""
    questions = (
        result(
            f"q{n}",
            [0] * right + [1] * (total - right),
            tokens=[length + n] * total,
            chosen=0 if 2 * right >= total else 1,
        )
        for n, (right, total) in enumerate(shares)
    )
    return summary(*questions, policy=policy)


A = run_of((4, 4), (2, 4), (1, 4), (0, 4), (3, 4))
B = run_of((4, 4), (1, 4), (1, 4), (0, 4), (1, 4), policy="lim", length=150)


def test_the_difference_is_that_of_the_questions_means() -> None:
    found = compare(A, B)
    assert found.difference.value == pytest.approx((0 - 1 / 4 + 0 + 0 - 2 / 4) / 5)
    assert found.difference.low < found.difference.value < found.difference.high
    assert found.length_ratio.value == pytest.approx(152 / 102)
    assert (found.a, found.b, found.num_questions) == ("full", "lim", 5)
    assert (found.mcnemar.only_a, found.mcnemar.only_b) == (2, 0)
    assert found.other_differences == ()


def test_the_other_way_round_everything_is_mirrored() -> None:
    there, back = compare(A, B), compare(B, A)
    assert back.difference.value == -there.difference.value
    assert back.difference.low == pytest.approx(-there.difference.high, abs=0.02)
    assert back.length_ratio.value == pytest.approx(1 / there.length_ratio.value)
    assert (back.mcnemar.only_a, back.mcnemar.only_b) == (0, 2)


def test_the_order_of_the_questions_changes_nothing_that_counts() -> None:
    turned = Summary(B.run_id, B.conditions, B.questions[::-1], 0)
    assert compare(A, turned).difference.value == compare(A, B).difference.value
    assert compare(A, turned).mcnemar == compare(A, B).mcnemar


def test_a_seed_gives_the_same_interval_again_and_another_one_nearly_the_same() -> None:
    rng = random.Random(3)
    lengths = [(rng.uniform(50, 500), rng.uniform(50, 500)) for _ in range(50)]
    one, again, other = (
        bootstrap([(0.0, 0.0)] * 50, lengths, seed=seed, resamples=2000)[1] for seed in (1, 1, 2)
    )
    assert one == again
    assert other != one
    assert other.low == pytest.approx(one.low, rel=0.02)


def test_a_run_compared_with_itself_shows_nothing_and_says_so() -> None:
    found = compare(A, A)
    assert found.difference == Interval(0.0, 0.0, 0.0)
    assert found.mcnemar.p == 1.0
    assert found.length_ratio == Interval(1.0, 1.0, 1.0)
    assert "no difference is shown" in found.sentence


def test_the_interval_is_that_of_a_t_distribution_where_there_is_much_to_resample() -> None:
    shares = [(0.5, 0.5 + 0.1 * (n % 3)) for n in range(60)]
    found, _ = bootstrap(shares, [(1.0, 1.0)] * 60, seed=0, resamples=20_000)
    # mean 0.1, standard error 0.0823 / sqrt(60), t(59) = 2.001
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low == pytest.approx(2 * 2.001 * 0.08234 / 60**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (9, 3), (12, 12), (0, 20), (210, 160)], ids=str
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    answers = [(True, False)] * only_a + [(False, True)] * only_b + [(True, True)] * 5
    found = mcnemar([*answers, (False, False)])
    assert (found.only_a, found.only_b) == (only_a, only_b)
    count = only_a + only_b
    expected = binomtest(only_a, count).pvalue if count else 1.0
    assert found.p == pytest.approx(expected)


@pytest.mark.parametrize(
    ("difference", "parts"),
    [
        (Interval(-0.052, -0.08, -0.02), ["5.2 points fewer", "a loss that chance"]),
        (Interval(0.04, 0.01, 0.07), ["4.0 points more", "a gain that chance"]),
        (
            Interval(-0.01, -0.031, 0.007),
            ["1.0 points fewer", "no difference is shown", "more than 3.1", "more than 0.7"],
        ),
    ],
    ids=["loss", "gain", "neither"],
)
def test_the_sentence_says_what_the_data_support(difference: Interval, parts: list[str]) -> None:
    said = sentence("full", "lim-256", difference, Interval(1.02, 0.99, 1.05))
    assert all(part in said for part in [*parts, "1.02 times as long (0.99 to 1.05)"])


def test_runs_of_other_tasks_or_questions_are_not_compared() -> None:
    with pytest.raises(DataError, match="of sums and run of other"):
        compare(A, summary(*A.questions, task="other"))
    with pytest.raises(DataError, match="their texts differ"):
        compare(A, summary(*A.questions, questions="changed"))
    with pytest.raises(DataError, match=r"1 questions are in one only: q4.*--common"):
        compare(A, summary(*A.questions[:4]))
    aborted = result("q4", [0], states={0: SampleState.ABORTED})
    with pytest.raises(DataError, match="in one only: q4"):
        compare(A, summary(*A.questions[:4], aborted))


def test_what_both_have_is_compared_on_demand() -> None:
    found = compare(A, summary(*B.questions[:2], questions="fewer"), common=True)
    assert found.num_questions == 2
    assert found.difference.value == pytest.approx(-1 / 8)
    with pytest.raises(DataError, match="share 1 questions"):
        compare(A, summary(A.questions[0]), common=True)


def test_conditions_that_differ_beside_the_policy_are_named() -> None:
    other = summary(*A.questions, policy="lim", max_tokens=10, commit="x")
    assert compare(A, other).other_differences == ("max_tokens: None and 10",)


def test_the_command_compares_all_with_the_first(tmp_path: Path) -> None:
    names = []
    for name, run in {"a": A, "b": B, "c": A}.items():
        write_summary(run, tmp_path / f"{name}.json")
        names.append(str(tmp_path / f"{name}.json"))
    shown = CliRunner().invoke(app, ["compare", *names])
    assert shown.exit_code == 0, shown.output
    assert compare(A, B).sentence in shown.output
    lines = CliRunner().invoke(app, ["compare", *names, "--json"]).stdout.splitlines()
    assert [json.loads(line)["b"] for line in lines] == ["lim", "full"]
    assert json.loads(lines[0])["mcnemar"]["only_a"] == 2
