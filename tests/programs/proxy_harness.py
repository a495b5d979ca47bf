"""The proxy in front of a server, in a thread of the test's process."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from lim_sglang.programs.proxy.app import Proxy, ProxyServer, create_app
from lim_sglang.programs.proxy.command import listen
from lim_sglang.programs.proxy.upstream import Upstream
from lim_sglang.programs.proxy.vote_queue import VoteQueue
from lim_sglang.programs.schema import Access, Sampling
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import Answerer, FakeServer, serving

QUESTION: list[Any] = [{"role": "user", "content": "What is 17 * 23?"}]


@dataclass(frozen=True)
class Served:
    """A running proxy."""

    url: str
    queue: VoteQueue

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return OpenAI's client, which tries nothing twice here."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def post(self, body: Any, *, timeout: float) -> Any:
        """Ask a question without OpenAI's client; leaving the block disconnects."""
        url = f"{self.url}/v1/chat/completions"
        return httpx.stream("POST", url, json=body, timeout=timeout)

    def ask(self, model: str = "majority@3", **fields: Any) -> Any:
        """Ask a question."""
        request = {"model": model, "messages": QUESTION, **fields}
        return self.client().chat.completions.create(**request)


@contextmanager
def proxy_at(
    url: str,
    *,
    api_key: str | None = None,
    max_questions: int = 4,
    max_waiting: int = 4,
    thinking_budget: int | None = None,
) -> Iterator[Served]:
    """Run a proxy in front of a server; answers are equal if their texts are."""
    ready = threading.Event()
    access = Access(url, api_key=api_key, thinking_budget=thinking_budget)
    with listen("127.0.0.1", 0) as port, closing(SglangBackend(access)) as backend:
        queue = VoteQueue(backend, str.__eq__, max_questions=max_questions, max_waiting=max_waiting)
        app = create_app(Proxy(queue, Upstream(url), Sampling(), api_key, thinking_budget))
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


PROXY_OPTIONS = frozenset(("api_key", "max_questions", "max_waiting", "thinking_budget"))


@contextmanager
def proxied(answer: Answerer, **options: Any) -> Iterator[tuple[FakeServer, Served]]:
    """Run a fake SGLang server and a proxy in front of it, each with its own options."""
    of_proxy = {name: value for name, value in options.items() if name in PROXY_OPTIONS}
    of_server = {name: value for name, value in options.items() if name not in PROXY_OPTIONS}
    with serving(answer, **of_server) as fake, proxy_at(fake.url, **of_proxy) as served:
        yield fake, served
