"""A program on a real server: samples of a settled vote are gone from the server at once."""

import threading
import time
from contextlib import closing

import httpx
import pytest

from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.sampler import SamplingRun
from lim_sglang.programs.schema import Access, SampleState
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.processes import LocalServer
from tests.programs.harness import run_on

pytestmark = pytest.mark.e2e

SAMPLES, TOKENS, MAX_TOKENS = 6, 240, 900
GONE_WITHIN_S = 2.0


@pytest.fixture
def server(tiny_server: LocalServer) -> LocalServer:
    """The server of this file and of `test_tiny_server.py`."""
    return tiny_server


def running_requests(server: LocalServer) -> int:
    """Return the number of requests that the server has."""
    loads = httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def test_samples_of_a_settled_program_are_gone_from_the_server_at_once(server: LocalServer) -> None:
    settled_at_s, gone_at_s, most = 0.0, 0.0, 0

    def watch(run: SamplingRun) -> None:
        nonlocal settled_at_s, gone_at_s, most
        while not gone_at_s:
            count = running_requests(server)
            most = max(most, count)
            if run.settled:
                settled_at_s = settled_at_s or time.monotonic()
                gone_at_s = 0.0 if count else time.monotonic()

    def begin(run: SamplingRun) -> None:
        watching.append(threading.Thread(target=watch, args=(run,)))
        watching[0].start()

    watching: list[threading.Thread] = []
    with closing(SglangBackend(Access(server.url))) as backend:
        outcome = run_on(
            backend,
            SAMPLES,
            program=PROGRAMS["budget"],
            options={"tokens": TOKENS},
            on_begin=begin,
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
        )
    watching[0].join(30)
    assert most > 1
    assert 0 < gone_at_s - settled_at_s <= GONE_WITHIN_S
    aborted = [s for s in outcome.samples if s.state is SampleState.ABORTED]
    assert len(aborted) >= 2
    assert all(sample.num_tokens < MAX_TOKENS for sample in aborted)
    assert sum(sample.num_tokens > 0 for sample in aborted) >= 2  # others may still have waited
    assert outcome.settled
    assert outcome.spent_tokens >= TOKENS


def test_the_server_publishes_the_models_sampling_defaults(server: LocalServer) -> None:
    live = server.lim()
    assert live is not None
    assert isinstance(live["sampling_defaults"], dict)
    with closing(SglangBackend(Access(server.url))) as backend:
        assert backend.sampling_defaults() == live["sampling_defaults"]
