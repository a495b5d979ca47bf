"""Uvicorn around the proxy's routes: says when it listens, gives questions up before it ends."""

import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

GRACE_S = 2
"""For answers that are being written when the proxy is stopped."""


class ProxyServer(uvicorn.Server):
    """A server that can be stopped while clients wait for an answer."""

    def __init__(
        self, app: FastAPI, *, when_ready: Callable[[], None], when_stopped: Callable[[], None]
    ) -> None:
        """Does not listen yet.

        Args:
            when_ready: called once clients are answered.
            when_stopped: called as soon as a signal to stop has come; ends what clients wait for.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._when_ready = when_ready
        self._when_stopped = when_stopped

    def serve_until_stopped(self, listener: socket.socket) -> None:
        """Answer clients until Ctrl-C, SIGTERM or, unless that is ignored, SIGHUP.

        Uvicorn raises the signal once more when it has ended, for handlers that were there before.
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.handle_exit)
        try:
            self.run([listener])
        except KeyboardInterrupt:
            return

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what clients wait for, so that their connections end."""
        self._when_stopped()
        await super().shutdown(sockets)
