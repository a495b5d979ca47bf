"""The `lim proxy` command: a server in front of a running one, whose answers are votes."""

import errno
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Annotated

import typer
from rich.console import Console

from lim_sglang.errors import ConfigError
from lim_sglang.programs.grading.equivalence import EquivalenceChecker
from lim_sglang.programs.http_client import root_url
from lim_sglang.programs.options import (
    ApiKeyOption,
    MaxTokensOption,
    TemperatureOption,
    ThinkingBudgetOption,
    ThinkingOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    UrlOption,
)
from lim_sglang.programs.program import load_frontend
from lim_sglang.programs.schema import (
    DEFAULT_URL,
    Access,
    Sampling,
    check_thinking_budget,
    resolve_sampling,
)
from lim_sglang.programs.sglang_backend import connect

BACKLOG = 2048
"""Connections that may wait to be taken, as uvicorn has it."""


def proxy(
    url: UrlOption = DEFAULT_URL,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 30001,
    api_key: ApiKeyOption = None,
    max_questions: Annotated[
        int, typer.Option(min=1, max=256, help="Questions answered at the same time.")
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Questions that may wait; further ones get HTTP 429.")
    ] = 64,
    concurrency: Annotated[
        int,
        typer.Option(min=1, help="Samples that the server is asked for at the same time."),
    ] = 64,
    max_tokens: MaxTokensOption = Sampling.max_tokens,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    thinking: ThinkingOption = None,
    thinking_budget: ThinkingBudgetOption = None,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Answer OpenAI's chat completions by a vote: model "majority@16" in place of a model's name.

    Clients send the server's key. Sampling options apply to requests that name none. Requests for
    other models are forwarded to the server.
    """
    check_thinking_budget(thinking_budget, max_tokens)
    console = Console(stderr=True)
    access = Access(
        url,
        api_key=api_key,
        timeout_s=timeout,
        max_concurrency=concurrency,
        thinking=thinking,
        thinking_budget=thinking_budget,
    )
    # Closing the backend aborts the samples that are in flight at the server.
    with listen(host, port) as listener, closing(connect(access, console)) as backend:
        from lim_sglang.programs.proxy.app import Proxy, ProxyServer, create_app
        from lim_sglang.programs.proxy.upstream import Upstream
        from lim_sglang.programs.proxy.vote_queue import VoteQueue

        sampling = resolve_sampling(
            backend.sampling_defaults(),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        with EquivalenceChecker() as checker:
            checker.warm_up()
            queue = VoteQueue(
                backend,
                checker.equivalent,
                max_questions=max_questions,
                max_waiting=max_waiting,
            )
            app = create_app(Proxy(queue, Upstream(url), sampling, api_key, thinking_budget))
            limit = samples_limit(concurrency, backend.limiter.total)
            limits = {
                "questions": f"{max_questions} at once (--max-questions), {max_waiting} more may "
                "wait (--max-waiting)",
                "samples": f"{backend.limiter.total} at once, of all questions ({limit})",
                "threads": f"{queue.max_threads} at most: 3 a question, 1 a sample",
            }
            ready = ready_text(listener, root_url(url), limits, with_key=bool(api_key))

            # A first vote waits for this import of seconds, other requests do not.
            loading = threading.Thread(
                target=load_frontend, args=[Console(quiet=True)], daemon=True
            )

            def begin() -> None:
                typer.echo(ready)
                loading.start()

            begin_to_listen(listener)
            server = ProxyServer(app, when_ready=begin, when_stopped=queue.close)
            server.serve_until_stopped(listener)
            typer.echo("Stopping the proxy.")


def samples_limit(concurrency: int, taken: int) -> str:
    """Return the option that limits the samples in flight, and why they may be fewer."""
    if taken == concurrency:
        return "--concurrency"
    return f"--concurrency {concurrency}, but the server runs at most {taken}"


def ready_text(
    listener: socket.socket, url: str, limits: Mapping[str, str], *, with_key: bool
) -> str:
    """Return the lines that say where the proxy is, what it takes, and how to ask it.

    Args:
        limits: the name and the text of each limit.
    """
    host, port, *_ = listener.getsockname()
    here = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = ' -H "Authorization: Bearer $LIM_API_KEY"' if with_key else ""
    question = '{"model": "majority@8", "messages": [{"role": "user", "content": "..."}]}'
    return "\n".join(
        [
            "",
            "The voting proxy is live",
            f"  base url  {here}/v1",
            f"  server    {url}",
            *(f"  {name:10}{text}" for name, text in limits.items()),
            '  model     "majority@16", "adaptive@40?confidence=0.9"; others go to the server',
            f"  ask       curl {here}/v1/chat/completions{key} "
            f"-H 'Content-Type: application/json' -d '{question}'",
            # A script hands an ignored SIGINT down to what it starts in the background.
            f"  stop      Ctrl-C, or kill {os.getpid()}",
            "",
        ]
    )


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow is done; raises `ConfigError` if that fails."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        with _refusals_in_words(host, port):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except ConfigError:
        listener.close()
        raise
    return listener


def begin_to_listen(listener: socket.socket) -> None:
    """Let clients connect; raises `ConfigError` if another process has begun before.

    Linux lets two processes bind a port as long as neither listens, and uvloop passes the refusal
    of the second over in silence.
    """
    host, port, *_ = listener.getsockname()
    with _refusals_in_words(host, port):
        listener.listen(BACKLOG)


@contextmanager
def _refusals_in_words(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use: choose another --port") from None
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose other ones"
        ) from None
