"""A proxy in front of a fake server, in this process, and OpenAI's own client."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import openai

from lim_sglang.programs.proxy import Proxy, ProxyServer, Upstream, VoteQueue, create_app
from lim_sglang.programs.proxy_command import listen
from lim_sglang.programs.schema import Sampling
from lim_sglang.programs.sglang_backend import SglangBackend, ThinkingBudgetBackend
from tests.fakes.sglang_server import FakeServer

QUESTION: list[Any] = [{"role": "user", "content": "What is 17 * 23?"}]


@dataclass(frozen=True)
class Served:
    """A running proxy."""

    url: str
    queue: VoteQueue

    def client(self, key: str = "none") -> openai.OpenAI:
        """What users have; it tries nothing twice here."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    @property
    def chat(self) -> Any:
        """The client's chat completions."""
        return self.client().chat.completions

    def post(self, body: Any, *, timeout: float) -> Any:
        """One question without OpenAI's client; who leaves the block hangs up."""
        url = f"{self.url}/v1/chat/completions"
        return httpx.stream("POST", url, json=body, timeout=timeout)

    def ask(self, model: str = "majority@3", **fields: Any) -> Any:
        """One question."""
        return self.chat.create(**{"model": model, "messages": QUESTION, **fields})


@contextmanager
def proxied(
    fake: FakeServer,
    *,
    api_key: str | None = None,
    max_questions: int = 4,
    max_waiting: int = 4,
    thinking_budget: int | None = None,
) -> Iterator[Served]:
    """Run a proxy until the block ends; answers are equal if their texts are."""
    ready = threading.Event()
    create = (
        partial(ThinkingBudgetBackend, thinking_budget=thinking_budget)
        if thinking_budget
        else SglangBackend
    )
    with closing(create(fake.url, api_key=api_key)) as backend, listen("127.0.0.1", 0) as port:
        queue = VoteQueue(
            *(backend, str.__eq__),
            max_questions=max_questions,
            max_waiting=max_waiting,
        )
        app = create_app(Proxy(queue, Upstream(fake.url), Sampling(), api_key, thinking_budget))
        server = ProxyServer(app, when_ready=ready.set, when_stopped=queue.close)
        thread = threading.Thread(target=server.run, args=([port],))
        thread.start()
        assert ready.wait(10)
        try:
            yield Served(f"http://127.0.0.1:{port.getsockname()[1]}", queue)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
