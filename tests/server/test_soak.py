"""The soak's verdicts, and a short soak of the shared server; the long one is `tests.soak`."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import LocalServer
from tests.soak.server_soak import Log, Outcome, broken_claims, soak_server, summary

SHORT = 24
"""Requests of a short soak: five of each frequent kind."""
WHOLE = Outcome(0, "plain", 3, 2, "finished", [[7, 8]], own_prompt=True)
FINE = {
    **{"used_tokens": 0, "retracted": 1, "wrong_sets": 0, "wrong_outputs": 0},
    **{"wrong_summaries": 0},
    "memory": {"rss_mib": {"third": 100.0, "last": 101.0}},
}


@pytest.mark.parametrize(
    ("outcomes", "broken"),
    [
        ([WHOLE], []),
        ([], ["no request is lost"]),
        ([WHOLE, WHOLE], ["no request is lost"]),
        ([replace(WHOLE, kind="sampled", outputs=[[7]])], ["every request ends as its kind says"]),
        ([replace(WHOLE, ended="503: busy")], ["every request ends as its kind says"]),
        ([replace(WHOLE, ended="aborted")], ["every request ends as its kind says"]),
        ([replace(WHOLE, kind="abort", ended="aborted", outputs=[[]])], []),
        (
            [replace(WHOLE, outputs=[[7, 8], [7, 9]])],
            ["every finished greedy answer equals its solo run"],
        ),
        ([replace(WHOLE, outputs=[[7, 9]], retractions=1)], []),
        ([replace(WHOLE, outputs=[[7, 9]], own_prompt=False)], []),
        ([replace(WHOLE, outputs=[[7, 9]], kind="sampled")], []),
    ],
)
def test_a_soak_names_what_went_wrong(outcomes: list[Outcome], broken: list[str]) -> None:
    found = FINE | summary(outcomes, {3: [7, 8, 9]}, num_requests=1)
    found["retracted"] = 1
    assert broken_claims(found, exact=True) == broken
    if broken == ["every finished greedy answer equals its solo run"]:
        assert not broken_claims(found, exact=False)


@pytest.mark.parametrize(
    ("output", "tie", "is_wrong"),
    [
        ([7, 9], 1, False),
        ([7, 9], 0, False),
        ([7, 9], 2, True),
        ([6, 8], 1, True),
        ([7, 8], 1, False),
    ],
)
def test_an_answer_may_differ_from_a_tie_on_and_not_before(
    output: list[int], tie: int, is_wrong: bool
) -> None:
    found = summary([replace(WHOLE, outputs=[output])], {3: [7, 8, 9]}, 1, {3: tie})
    assert found["differing"] == [0] * is_wrong
    assert found["differing_from_a_tie_on"] == [0] * (output != [7, 8] and not is_wrong)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"used_tokens": 5}, ["the KV cache is empty after a flush"]),
        ({"wrong_sets": 1}, ["no set, no output and no summary is wrong"]),
        ({"wrong_summaries": 1}, ["no set, no output and no summary is wrong"]),
        ({"wrong_outputs": 1}, ["no set, no output and no summary is wrong"]),
        (
            {"memory": {"rss_mib": {"third": 100.0, "last": 110.0}}},
            ["resident memory is flat over the second half"],
        ),
    ],
)
def test_a_soak_looks_at_the_server_too(change: dict[str, object], broken: list[str]) -> None:
    found = FINE | summary([WHOLE], {3: [7, 8]}, num_requests=1) | {"retracted": 1} | change
    assert broken_claims(found, exact=True) == broken


def test_a_resumed_soak_drops_the_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    path.write_text('{"number": 0}\n{"numb')
    log = Log(path)
    log.add({"number": 1})
    assert Log(path).found == [{"number": 0}, {"number": 1}]


@pytest.mark.e2e
def test_a_short_soak_loses_nothing_and_changes_nothing(
    tiny_server: LocalServer, tmp_path: Path
) -> None:
    soak = soak_server(tiny_server, tmp_path, num_requests=SHORT, seed=1)
    found = asyncio.run(soak)
    # The shared server's KV cache is large enough for all of them.
    assert set(found["broken"]) <= {"requests were retracted"}, found
    assert found["compared"] > SHORT // 3
    assert found["sparse_rows"] > 0
