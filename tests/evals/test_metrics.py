"""Summaries of runs, and scores against figures worked out by hand or by listing all subsets."""

import json
import math
import operator
import random
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals import metrics
from lim_sglang.evals.metrics import (
    Estimate,
    QuestionResult,
    Summary,
    majority_at_k,
    pass_at_k,
    score,
    summarise,
    winning_subsets,
)
from lim_sglang.evals.run_store import GRADES_FILE, Failure, GradedSample, RunRecord, open_run
from lim_sglang.evals.summaries import find_runs, load_summaries, read_summary, write_summary
from lim_sglang.programs.schema import SampleState
from lim_sglang.programs.vote import tally
from tests.builders import make_sample
from tests.evals.summaries import CONDITIONS, FOUR, question, run

FINISHED, TRUNCATED, ABORTED = SampleState.FINISHED, SampleState.TRUNCATED, SampleState.ABORTED
CONFIG = {"policy": "lessismore", "budget": 256, "ranking": "rank", "recent_ratio": 0.25}
SAMPLING = {"max_tokens": 100, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
SETTINGS: dict[str, Any] = {
    "task": "aime24",
    "questions": {"asked": 2, "asked_digest": "d1", "digest": "d2", "revision": "r"},
    "prompt_sha256": "p",
    "system": "SECRET system prompt",
    "thinking": {"enabled": True, "budget": 50},
    "program": {"name": "majority", "options": {}, "parallel": None},
    "num_samples": 4,
    "sampling": {**SAMPLING, "seed": None, "seed_honoured": False},
    "server": {
        "model_path": "/data/models/tiny/",
        "tokenizer_path": "/data/models/tiny/",
        "chat_template": None,
        "json_model_override_args": "{}",
        "tp_size": 1,
        "device_name": "GPU",
    },
    "lim": {"config": CONFIG, "roles": ["full", "full", "select", "reuse", "select", "reuse"]},
    "versions": {"math_verify": "0.9.0"},
}
ABOUT = {"commit": "abc", "began": "2026-11-25T10:00:00+00:00", "client_versions": {"torch": "2"}}
RECORD = RunRecord("run-1", SETTINGS, ABOUT)


def graded(name: str, index: int, answer: str | None, **more: Any) -> GradedSample:
    """Make a sample of a question whose right answer is 4."""
    late = more.pop("late", False)
    sample = replace(make_sample(index, answer, **more), rid="SECRET rid")
    return GradedSample(name, "SECRET gold", answer == "4", sample, late=late)


def equivalent(a: str, b: str) -> bool:
    return a.strip() == b.strip()


SAMPLES = [
    graded("b", 3, "5"),
    graded("b", 0, "5"),
    graded("a", 1, " 4"),
    graded("a", 0, "4", num_tokens=70),
    graded("b", 1, "4"),
    graded("b", 2, None, state=TRUNCATED),
    graded("a", 2, "6"),
    graded("a", 3, "6", late=True),
]


def summarise_one(*samples: GradedSample, program: str = "majority") -> QuestionResult:
    """Summarise the samples of a single question."""
    settings = {**SETTINGS, "program": {"name": program, "options": {}}}
    (found,) = summarise(RunRecord("r", settings, ABOUT), samples, equivalent).questions
    return found


def test_votes_are_counted_by_index_in_any_order_of_completion() -> None:
    found = summarise(RECORD, SAMPLES, equivalent, num_failed=1)
    assert found == summarise(RECORD, SAMPLES[::-1], equivalent, num_failed=1)
    a, b = found.questions
    assert (a.question_id, a.indices, a.group, a.chosen) == ("a", (0, 1, 2, 3), (0, 0, 1, 1), 0)
    assert (a.correct, a.tokens[0]) == ((True, False, False, False), 70)  # as graded
    assert a.answer_correct
    assert (b.group, b.chosen, b.answer_correct) == ((0, 1, None, 0), 0, False)
    assert b.states[2] is TRUNCATED


def test_the_verdict_on_an_answer_is_that_of_its_earliest_voter() -> None:
    """Equality is not transitive: answers that share a vote may be graded differently."""
    late_wrong = graded("q", 0, " 4", late=True)
    others = [graded("q", 1, "4"), graded("q", 2, " 4"), graded("q", 3, "5")]
    found = summarise_one(late_wrong, *others)
    assert (found.group, found.chosen, found.answer_correct) == ((0, 0, 0, 1), 0, True)
    assert found.voters == (1, 2, 3)
    assert not summarise_one(*others[1:]).answer_correct


def test_aborted_and_late_samples_have_no_vote() -> None:
    aborted = graded("q", 0, None, state=ABORTED, num_tokens=7)
    found = summarise_one(aborted, graded("q", 1, "4", state=TRUNCATED))
    assert (found.group, found.chosen, found.completed) == ((None, 0), 0, (1,))
    assert (found.share_correct, found.tokens) == (1, (7, 10))
    nothing = summarise_one(aborted)
    assert (nothing.share_correct, nothing.chosen, nothing.answer_correct) == (None, None, False)
    late = [graded("q", 0, "4"), *(graded("q", n, "6", late=True) for n in (1, 2))]
    assert summarise_one(*late).chosen == 0


@pytest.mark.parametrize(("program", "chosen"), [("majority", 0), ("short", 1), ("confidence", 1)])
def test_each_program_ranks_its_groups_in_its_own_way(program: str, chosen: int) -> None:
    weights = (1.0, 3.0) if program == "confidence" else (None, None)
    long = graded("q", 0, "4", num_tokens=50, confidence=weights[0])
    short = graded("q", 1, "6", num_tokens=20, confidence=weights[1])
    assert summarise_one(long, short, program=program).chosen == chosen


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"model": "tiny", "server": {"tokenizer_path": "tiny", "tp_size": 1}, "budget": 256}),
        ({}, {"task_version": 1, "versions": {"torch": "2", "math_verify": "0.9.0"}}),
        ({}, {"dense_layers": [0, 1], "select_layers": [2, 4], "date": "2026-11-25", **SAMPLING}),
        ({"system": None}, {"system_sha256": None, "thinking": True, "thinking_budget": 50}),
        ({"lim": None, "api": "openai"}, {"policy": "openai", "budget": None}),
        ({"lim": None}, {"dense_layers": None, "select_layers": None}),
        (
            {"lim": {"config": {**CONFIG, "policy": "full"}, "roles": ["full"] * 6}},
            {"policy": "full", "budget": None, "dense_layers": None, "select_layers": None},
        ),
        ({"program": None}, {"program": "majority", "options": {}}),  # of the oldest records
    ],
)
def test_conditions_say_what_the_scores_hold_for(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    record = RunRecord("r", {**SETTINGS, **changes}, ABOUT)
    found = summarise(record, [], equivalent).conditions
    assert expected.items() <= found.items()
    assert [name for name in found if name != "sampling_version"] == list(CONDITIONS)
    assert "SECRET" not in str(found)


@pytest.mark.parametrize(
    ("program", "expected"),
    [("majority", False), ("single", False), ("adaptive", True), ("of the future", True)],
)
def test_unknown_programs_are_taken_to_stop_early(program: str, expected: bool) -> None:
    assert metrics.stops_early({"program": program}) is expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/data/models/tiny/", "tiny"),
        ("models/deep/tiny", "tiny"),
        ("./tiny", "tiny"),
        ("~/tiny", "tiny"),
        ("tiny", "tiny"),
    ],
)
def test_a_folder_of_this_machine_is_not_published(path: str, expected: str) -> None:
    assert metrics.published_name(path) == expected


def test_models_are_renamed_and_unknown_names_refused() -> None:
    runs = [run(model="tiny"), run(model="other")]
    renamed = metrics.rename_models(runs, {"tiny": "a/b"})
    assert [summary.conditions["model"] for summary in renamed] == ["a/b", "other"]
    with pytest.raises(ConfigError, match=r"--name big: no run has .*models are tiny, other"):
        metrics.rename_models(runs, {"big": "a/b"})


def test_a_summary_is_read_as_it_was_written_and_holds_no_text(tmp_path: Path) -> None:
    texts = {"text": "SECRET thoughts", "error": "SECRET error"}
    samples = [replace(each, sample=replace(each.sample, **texts)) for each in SAMPLES]
    found = summarise(RECORD, samples, equivalent, num_failed=2)
    path = tmp_path / "deep" / "s.json"
    write_summary(found, path)
    assert read_summary(path) == found
    assert "SECRET" not in path.read_text()
    assert sum('"id"' in line for line in path.read_text().splitlines()) == 2  # a line a question
    assert list(path.parent.iterdir()) == [path]


def test_summaries_are_named_by_their_runs_and_stay_in_the_folder(tmp_path: Path) -> None:
    sly = Summary("../../sly/run", {}, (), 0)
    written = metrics.write_summaries([sly], tmp_path / "kept")
    assert written == list(tmp_path.rglob("*.json")) == [tmp_path / "kept" / "-..-sly-run.json"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_summary(sly, tmp_path / "file" / "s.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 9, "has format 9, expected 1"),
        ("format", None, "is not the summary of a run"),
        ("conditions", None, "'conditions' is missing"),
        ("group", None, "'group' is missing"),
        ("tokens", [1, 2, 3], "the lists of question a differ"),
        ("tokens", [1, 2, 3, "4"], "integer tokens"),
        ("states", ["lost"] * 4, "'lost' is not a valid SampleState"),
        ("id", "b", "a question occurs twice"),
        ("indices", [0, 2, 1, 3], "ascending indices"),
        ("indices", [0, 1, 1, 3], "ascending indices"),
        ("chosen", 2, "chose a group without a vote"),
        ("late", [True, True, False, False], "chose a group without a vote"),
    ],
)
def test_a_damaged_summary_is_refused(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    path = tmp_path / "s.json"
    write_summary(summarise(RECORD, SAMPLES, equivalent), path)
    content = json.loads(path.read_text())
    part = content if field in content else content["questions"][0]
    part[field] = value
    if value is None:
        del part[field]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"s.json.*{message}"):
        read_summary(path)


def test_what_holds_no_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json.*No such file"):
        read_summary(tmp_path / "none.json")
    with pytest.raises(DataError, match="holds no run and no summary"):
        find_runs([tmp_path])
    with open_run(tmp_path / "run", RECORD), pytest.raises(DataError, match="has no sample yet"):
        load_summaries([tmp_path / "run"])
    for content, message in (("{", "is not JSON"), ("[1]", "is not the"), ("\xff", "is not JSON")):
        (tmp_path / "s.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=rf"s\.json.*{message}"):
            read_summary(tmp_path / "s.json")


def test_the_folder_of_a_run_is_summarised_with_its_newest_verdicts(tmp_path: Path) -> None:
    folder = tmp_path / "run-1"
    with open_run(folder, RECORD) as opened:
        opened.append(*(each for each in SAMPLES if not each.late))
        opened.append_failure(Failure("a", 3, "connection refused"))
    newer = {"question": "b", "index": 2, "answer": "005", "correct": True}
    (folder / GRADES_FILE).write_text(json.dumps(newer) + "\n")
    (found,) = load_summaries([folder])
    a, b = found.questions
    assert (found.run_id, found.num_failed) == ("run-1", 1)
    assert a.group == (0, 0, 1)  # " 4" is the integer 4
    assert (b.group, b.correct, b.chosen) == ((0, 1, 0, 0), (False, True, True, False), 0)
    write_summary(found, tmp_path / "s.json")
    (tmp_path / "notes.txt").touch()
    assert load_summaries(find_runs([tmp_path])) == [found, found]
    assert find_runs([folder]) == [folder]


def test_scores_equal_those_worked_out_by_hand() -> None:
    found = score(FOUR)
    # pass@1 by question: 1, 1/2, 1/4, 0; the vote: 1, 1, 0, 0.
    assert found.pass_at_1 == found.pass_at[1]
    assert found.pass_at_1.value == pytest.approx(7 / 16)
    squares = [(share - 7 / 16) ** 2 for share in (1, 1 / 2, 1 / 4, 0)]
    assert found.pass_at_1.error == pytest.approx(math.sqrt(sum(squares) / 3 / 4))
    assert found.pass_at[4].value == 3 / 4
    assert found.pass_at[2].value == pytest.approx((1 + 5 / 6 + 1 / 2 + 0) / 4)
    assert found.majority_at[4].value == found.vote_correct.value == 1 / 2
    assert found.vote_correct.error == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    assert (found.num_questions, found.num_samples, found.num_failed) == (4, 16, 3)
    assert (found.truncated, found.no_answer, found.aborted) == (5 / 16, 5 / 16, 0)
    # Four samples each of 10, 20, 30 and 40 tokens.
    assert (found.mean_tokens, found.percentiles) == (25, {50: 25, 90: 40, 99: 40})
    assert found.questions_at == {1: 4, 2: 4, 4: 4}
    assert (found.tokens_per_question, found.tokens_per_correct) == (100, 400 / 7)


def test_an_aborted_sample_costs_tokens_and_is_neither_right_nor_wrong() -> None:
    stopped = question("q", [0, 1, None], states={2: ABORTED}, tokens=[10, 20, 70], chosen=0)
    found = score(run(stopped))
    assert (found.pass_at_1.value, found.num_samples, found.aborted) == (1 / 2, 2, 1 / 3)
    assert (found.mean_tokens, found.tokens_per_question) == (15, 100)
    assert found.percentiles == pytest.approx({50: 15, 90: 19, 99: 19.9})  # interpolated
    assert (found.tokens_per_correct, found.no_answer) == (100, 0)
    cut = score(run(replace(stopped, group=(0, None, None), states=(FINISHED, TRUNCATED, ABORTED))))
    assert cut.truncated == cut.no_answer == 1 / 2


def test_a_late_sample_counts_for_pass_and_has_no_vote() -> None:
    summary = run(question("q", [0, 1, 1], 1, late=[2], chosen=0))
    assert pass_at_k(summary, 1).value == pytest.approx(2 / 3)
    assert pass_at_k(summary, 3).value == 1
    assert majority_at_k(summary, 2).value == 0  # one vote each, the earlier one wins
    with pytest.raises(DataError, match="no question with 3"):
        majority_at_k(summary, 3)


def test_questions_with_too_few_samples_are_left_out_of_larger_k_only() -> None:
    found = score(run(question("long", [1, 0, 0]), question("short", [1])))
    assert found.pass_at_1.value == pytest.approx((2 / 3 + 0) / 2)
    assert found.pass_at[3] == Estimate(1.0, None)
    assert list(found.majority_at) == [1, 2, 3]
    assert found.questions_at == {1: 2, 2: 1, 3: 1}


def test_a_question_without_a_completed_sample_has_no_share_and_no_answer() -> None:
    gone = question("gone", [None], states={0: ABORTED})
    found = score(run(question("q", [0], chosen=0), gone))
    assert (found.pass_at_1, found.vote_correct.value) == (Estimate(1.0, None), 1 / 2)
    assert (found.num_questions, found.num_samples, found.aborted) == (2, 1, 1 / 2)
    assert found.tokens_per_question == (10 + 10) / 2
    assert score(run(question("q", [1, 1]))).tokens_per_correct is None
    with pytest.raises(DataError, match="nothing to score"):
        score(run(gone))


def winner_position(groups: list[int | None], subset: tuple[int, ...]) -> int | None:
    """Return the position of a subset's answer."""
    votes: dict[int, list[int]] = {}
    for position in subset:
        if (group := groups[position]) is not None:
            votes.setdefault(group, []).append(position)
    return min(votes.values(), key=lambda voters: (-len(voters), voters[0]))[0] if votes else None


@pytest.mark.parametrize("mixed", [False, True], ids=["one group is right", "any sample may be"])
def test_both_scores_of_k_samples_equal_the_mean_over_all_subsets(mixed: bool) -> None:
    rng = random.Random(0)
    for _ in range(360):
        groups = [rng.choice([None, 0, 1, 2, 3]) for _ in range(rng.randint(1, 9))]
        asked = question("q", groups, rng.choice([0, 1, 2]))
        if mixed:
            correct = tuple(group is not None and rng.random() < 0.5 for group in groups)
            asked = replace(asked, correct=correct)
        k = rng.randint(1, len(groups))
        subsets = list(combinations(range(len(groups)), k))
        passed = sum(any(asked.correct[n] for n in subset) for subset in subsets)
        winners = [winner_position(groups, subset) for subset in subsets]
        voted = sum(n is not None and asked.correct[n] for n in winners)
        summary = run(asked)
        assert pass_at_k(summary, k).value == pytest.approx(passed / len(subsets), abs=1e-12)
        assert majority_at_k(summary, k).value == pytest.approx(voted / len(subsets), abs=1e-12)


def test_the_majority_is_the_one_that_programs_vote_for() -> None:
    rng = random.Random(11)
    for _ in range(200):
        groups = [rng.choice([None, 0, 1, 2]) for _ in range(rng.randint(1, 8))]
        samples = [make_sample(n, None if g is None else str(g)) for n, g in enumerate(groups)]
        winner = tally(samples, operator.eq).winner
        summary = run(question("q", groups, 1))
        assert majority_at_k(summary, len(groups)).value == float(winner == "1")


def test_votes_of_64_samples_are_counted_exactly_and_in_time() -> None:
    rng = random.Random(4)
    groups = tuple(rng.choice([None, 0, 0, 0, 1, 1, 2, 3, 4, 5]) for _ in range(64))
    began_s = time.process_time()
    right, wrong = (
        winning_subsets(groups, tuple(g is not None and (g == 0) == is_right for g in groups))
        for is_right in (True, False)
    )
    assert time.process_time() - began_s < 1
    unanswered = groups.count(None)
    for k in range(65):  # each subset is right, wrong or without an answer
        assert right[k] + wrong[k] + math.comb(unanswered, k) == math.comb(64, k)
    assert 0.5 < right[32] / math.comb(64, 32) < 1
