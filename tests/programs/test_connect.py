"""From an address to a backend."""

import threading
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.errors import ServerError
from lim_sglang.programs.connect import connect
from tests.programs.drawn import run_on
from tests.programs.fake_server import Reply, completion, serving

CONSOLE = Console(quiet=True)


def test_a_server_is_not_given_more_than_it_says_it_runs() -> None:
    pair = threading.Barrier(2)

    def answer(_: dict[str, Any]) -> Reply:
        pair.wait(5)
        return completion("")

    with serving(answer, max_running_requests=2) as fake:
        endpoint = connect(fake.url, None, CONSOLE, timeout_s=20, max_concurrency=64)
        run_on(endpoint, 8)
        endpoint.close()
    assert len(fake.requests) == 8
    assert fake.most_running == 2


def test_what_is_not_there_is_said_before_the_frontend_is_loaded() -> None:
    with pytest.raises(ServerError, match="no server answers"):
        connect("http://127.0.0.1:9", None, CONSOLE, timeout_s=20, max_concurrency=1)
