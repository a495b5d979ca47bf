"""What becomes of a request that is cancelled before it is connected."""

import asyncio
import time
from concurrent.futures import CancelledError

import pytest

from lim_sglang.programs.http_client import Client, RequestTimeoutError


@pytest.mark.parametrize("closed", [True, False])
def test_a_request_that_is_cancelled_while_it_connects_is_cancelled_or_out_of_time(
    monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    async def connect(*_: object, **__: object) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("second argument (exceptions) must be non-empty") from None  # as anyio

    client = Client("http://127.0.0.1:9")
    monkeypatch.setattr(client.http, "request", connect)
    future = client.start(client.fetch("GET", "/slow", timeout_s=60 if closed else 0.05))
    if closed:
        time.sleep(0.1)
        client.close()
    with pytest.raises(CancelledError if closed else RequestTimeoutError):
        future.result(timeout=2)
    client.close()
