"""The server behind the proxy, for requests that are passed on as they are."""

from collections.abc import Mapping
from typing import Any

import httpx
from fastapi import Request, Response

from lim_sglang.programs.client import CONNECT_TIMEOUT_S, is_loopback, normalise_url
from lim_sglang.programs.hanging_up import Released

HEALTH_TIMEOUT_S = 5.0
NOT_PASSED_ON = frozenset(
    ("connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding")
)
"""Headers of one connection; its two ends write their own."""


class Upstream:
    """Passes requests on, and the answers back as they come. Belongs to one event loop."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet; raises `ServerError` where `url` is no HTTP address."""
        self.url = normalise_url(url)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=not is_loopback(self.url),
        )

    async def forward(self, request: Request, body: bytes) -> Response:
        """The server's answer to a request, key and all.

        Raises:
            httpx.RequestError: the server cannot be reached.
        """
        passed_on = self._http.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode() or None),
            headers=_passed(request.headers),
            content=body,
        )
        answer = await self._http.send(passed_on, stream=True)
        response = Released(
            answer.aiter_raw(), release=answer.aclose, status_code=answer.status_code
        )
        response.raw_headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in _passed(answer.headers).items()
        ]
        return response

    async def models(self, request: Request) -> list[Any]:
        """What the server lists as its models; nothing where it does not say."""
        try:
            answer = await self._http.get("/v1/models", headers=_passed(request.headers))
            return list(answer.raise_for_status().json()["data"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []

    async def is_healthy(self) -> bool:
        """Whether the server says that it is."""
        try:
            answer = await self._http.get("/health", timeout=HEALTH_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return answer.is_success

    async def close(self) -> None:
        """Cut off what is still being passed on."""
        await self._http.aclose()


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in NOT_PASSED_ON}
