"""Many samples at once: threads and memory stay bounded."""

import asyncio
import json
import threading
from contextlib import closing
from pathlib import Path
from threading import active_count
from typing import Any

import httpx
import pytest

from lim_sglang.programs.schema import Sample
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import completion, serving
from tests.programs.chains import Chain
from tests.programs.drawn import no_thread_is_left, run_on
from tests.programs.forking import ROOT, Forker
from tests.programs.proxied import QUESTION, proxied

TOKENS = 20
SCRIPT = ROOT / "tests" / "programs" / "drawing_many.py"


def test_512_samples_at_once_take_a_thread_and_little_memory_each(
    forker: Forker, tmp_path: Path
) -> None:
    chain = Chain((*["hm "] * (TOKENS - 1), "\\boxed{391}"), pace_s=0.02)
    with serving(lambda _: chain) as fake:
        command = forker.start(tmp_path, str(SCRIPT), fake.url, "512")
        assert command.wait() == 0, command.error
    record = json.loads(command.output)
    assert record["states"] == {"finished": 512}
    assert record["tokens"] == 512 * TOKENS
    assert len({body["rid"] for body in fake.requests}) == 512
    assert not fake.aborted
    assert record["threads"] <= 512 + 8
    assert record["grown_bytes"] < 100e6
    assert record["left"] <= 2
    assert record["seconds"] < 30


def test_a_sample_that_could_only_wait_for_a_place_has_no_thread() -> None:
    most = 0

    def note(_: Sample) -> None:
        nonlocal most
        most = max(most, active_count())

    with no_thread_is_left(), serving(lambda _: completion("\\boxed{391}")) as fake:
        before = active_count()
        with closing(SglangBackend(fake.url, max_concurrency=2)) as backend:
            outcome = run_on(backend, 40, note, parallel=40)
    assert outcome.vote.votes == 40
    assert fake.most_running <= 2
    # The program, the client, two branches that end and two that run, the answers' own threads.
    assert most - before <= 12


def started_since(before: set[threading.Thread]) -> list[str]:
    """Names of the threads that run now and did not then; the fake server's own left out."""
    new = set(threading.enumerate()) - before
    return [thread.name for thread in new if not thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("max_questions", [16, 200])
def test_200_questions_at_once_have_no_more_threads_than_the_proxy_says(max_questions: int) -> None:
    chain = Chain(("so ", "\\boxed{391}"), pace_s=0.1)
    body = {"model": "majority@8", "messages": QUESTION}
    most = 0

    async def ask_all(url: str) -> list[dict[str, Any]]:
        nonlocal most
        async with httpx.AsyncClient(
            timeout=120, limits=httpx.Limits(max_connections=None)
        ) as http:
            posts = [http.post(f"{url}/v1/chat/completions", json=body) for _ in range(200)]
            answers = asyncio.ensure_future(asyncio.gather(*posts))
            while not answers.done():
                most = max(most, len(started_since(before)))
                await asyncio.sleep(0.01)
            return [answer.json() for answer in answers.result()]

    with (
        serving(lambda _: chain) as fake,
        proxied(fake, max_questions=max_questions, max_waiting=200) as served,
    ):
        bound = served.queue.most_threads
        before = set(threading.enumerate())
        answers = asyncio.run(ask_all(served.url))
    assert {answer["lim"]["answer"] for answer in answers} == {"391"}
    assert len(fake.requests) == 200 * 8
    assert fake.most_running <= 64
    assert bound == 3 * max_questions + 64
    assert 64 < most <= bound
