"""The voting program, on SGLang's frontend and a fake server."""

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from lim_sglang.programs.schema import Sample, SampleState
from tests.fakes.sglang_server import Reply, completion, serving
from tests.programs.drawn import draw

SCRIPT = Path(__file__).parents[2] / "programs" / "majority.py"


def draw_samples(*arguments: Any, **how: Any) -> list[Sample]:
    """The samples of one question."""
    return list(draw(*arguments, **how).samples)


def test_each_sample_is_a_request_of_its_own_with_its_own_seed() -> None:
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        samples = draw_samples(fake, 5, seed=40, max_tokens=9)
    assert [sample.index for sample in samples] == list(range(5))
    assert {sample.answer for sample in samples} == {"391"}
    assert sorted(request["seed"] for request in fake.requests) == [40, 41, 42, 43, 44]
    assert [sample.seed for sample in samples] == [40, 41, 42, 43, 44]
    assert not any(sample.seed_honoured for sample in samples)
    assert len({request["rid"] for request in fake.requests}) == 5
    (content,) = {request["messages"][0]["content"] for request in fake.requests}
    assert content.startswith("What is 17 * 23?")
    assert "\\boxed{}" in content


def test_samples_are_delivered_as_they_end_and_returned_in_order() -> None:
    others = threading.Event()
    ended: list[int] = []

    def answer(request: dict[str, Any]) -> Reply:
        if request["seed"] == 0:
            others.wait(5)
        return completion("")

    def note(sample: Sample) -> None:
        ended.append(sample.index)
        if len(ended) == 2:
            others.set()

    with serving(answer) as fake:
        samples = draw_samples(fake, 3, note, seed=0)
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert ended[-1] == 0


def test_failures_are_samples_of_their_own_state() -> None:
    replies = {0: completion("\\boxed{1}"), 1: completion("and", reason="length"), 2: (400, {})}
    with serving(lambda request: replies[request["seed"]]) as fake:
        samples = draw_samples(fake, 3, seed=0)
    states = [SampleState.FINISHED, SampleState.TRUNCATED, SampleState.FAILED]
    assert [sample.state for sample in samples] == states
    assert samples[2].error
    assert samples[2].answer is None


def test_more_samples_than_may_run_at_once_are_all_drawn() -> None:
    with serving(lambda _: completion("\\boxed{2}")) as fake:
        samples = draw_samples(fake, 10, seed=0, parallel=4)
    assert fake.most_running <= 4
    assert Counter(request["seed"] for request in fake.requests) == Counter(range(10))
    assert len(samples) == 10
    assert {len(request["messages"]) for request in fake.requests} == {1}


def test_seeds_are_marked_where_the_server_honours_them() -> None:
    with serving(lambda _: completion(""), deterministic=True) as fake:
        samples = draw_samples(fake, 1, seed=3)
    assert samples[0].seed_honoured


def test_it_is_a_script_too() -> None:
    with serving(lambda _: completion("\\boxed{391}")) as fake:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "What is 17 * 23?", "--samples", "3", "--url", fake.url],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("answer: 391  (3 of 3 votes, 21 tokens")
    assert done.stderr.count("391  (7 tokens") == 3
