"""Clients that hang up: what was done for them ends at once."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """Nobody reads the answer any more."""


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Wait for some work, as long as the client does; else it is cancelled.

    Raises:
        HungUpError: the client is gone.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return await working
    finally:
        working.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Released(StreamingResponse):
    """A stream that lets go of its source however it ends, also if that is before its beginning.

    Starlette cancels a stream when its client hangs up.
    """

    def __init__(
        self, content: AsyncIterable[Any], *, release: Callable[[], Awaitable[None]], **how: Any
    ) -> None:
        super().__init__(content, **how)
        self._release = release

    async def __call__(self, *asgi: Any) -> None:
        """Answer as an ASGI application."""
        try:
            await super().__call__(*asgi)
        finally:
            await self._release()
