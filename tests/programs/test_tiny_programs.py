"""Programs against a real server: what is settled is gone from it, tokens and all."""

import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
import pytest
import sglang as sgl

from lim_sglang.programs.program import Program, run_program
from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.schema import Message, Sample, SampleState, Sampling, SamplingRequest
from lim_sglang.programs.sglang_backend import SglangBackend
from lim_sglang.programs.stopping import Equivalent, TokenBudgetRule
from tests.processes import LocalServer

pytestmark = pytest.mark.e2e

SAMPLES, TOKENS = 6, 60
GONE_WITHIN_S = 2.0


@pytest.fixture
def server(tiny_server: LocalServer) -> LocalServer:
    """The server of this file and of `test_tiny_server.py`."""
    return tiny_server


@dataclass
class Noting:
    """A token budget that notes when it is spent."""

    rule: TokenBudgetRule = field(default_factory=lambda: TokenBudgetRule(TOKENS))
    settled_at_s: float | None = None
    looks_at_tokens: ClassVar[bool] = True

    def is_settled(
        self, ended: Sequence[Sample], spent_tokens: int, equivalent: Equivalent
    ) -> bool:
        """As the rule says."""
        settled = self.rule.is_settled(ended, spent_tokens, equivalent)
        if settled and self.settled_at_s is None:
            self.settled_at_s = time.monotonic()
        return settled


def running_requests(server: LocalServer) -> int:
    """As the server counts them."""
    loads = httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def test_samples_of_a_settled_program_are_gone_from_the_server_at_once(server: LocalServer) -> None:
    rule = Noting()
    gone_at_s: list[float] = []
    most = 0

    def watch() -> None:
        nonlocal most
        while not gone_at_s:
            count = running_requests(server)
            most = max(most, count)
            if rule.settled_at_s is not None and not count:
                gone_at_s.append(time.monotonic())

    @sgl.function
    def program(s: Any, run: SamplingRun, indices: Sequence[int]) -> None:
        add_messages(s, run.question.messages)
        run.draw(s, indices, rule)

    watching = threading.Thread(target=watch)
    watching.start()
    question = SamplingRequest(
        (Message(role="user", content="w7 w8"),),
        Sampling(max_tokens=900, temperature=1.0, top_p=1.0, top_k=-1),
        parallel=SAMPLES,
        streamed=True,
    )
    with closing(SglangBackend(server.url)) as backend:
        outcome = run_program(
            *(Program("noting", program), backend, question),
            indices=range(SAMPLES),
            equivalent=str.__eq__,
        )
    watching.join(30)
    assert rule.settled_at_s is not None
    assert most > 1
    assert gone_at_s[0] - rule.settled_at_s <= GONE_WITHIN_S
    aborted = [s for s in outcome.samples if s.state is SampleState.ABORTED]
    assert len(aborted) >= 2
    assert all(0 < sample.num_tokens < 900 for sample in aborted)
    assert outcome.settled
    assert outcome.spent_tokens >= TOKENS


def test_the_server_publishes_the_models_sampling_defaults(server: LocalServer) -> None:
    live = server.lim()
    assert live is not None
    assert isinstance(live["sampling_defaults"], dict)
