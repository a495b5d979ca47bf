"""Several replicas of a server behind one address: each request goes to one of them, aborts and
flushes go to all, and `/server_info` is that of all, added up.

A request goes to the replica with the fewest requests in flight, or to one that has seen the
beginning of its prompt, and so may have it in its radix cache, unless that one has `SLACK` more.
Long outputs cost more than short prompts, so that the balance comes first.
"""

import asyncio
import hashlib
import itertools
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lim_sglang.config import lim_state
from lim_sglang.errors import ConfigError, ServerError, cut
from lim_sglang.programs.proxy.app import (
    METHODS,
    cancel_on_disconnect,
    json_response,
    words_as_answers,
)
from lim_sglang.programs.proxy.protocol import NoJsonError, parse_body
from lim_sglang.programs.proxy.upstream import Upstream

SLACK = 4
"""Requests in flight that a replica which has seen a prompt may have beyond the least loaded one:
this many samples of a question go together."""
MAX_KEYS = 20_000
"""Beginnings of prompts that are remembered, the newest."""
BLOCK_CHARACTERS, BLOCK_IDS = 1024, 256
"""Parts of a text, or of token ids, whose beginnings are told apart; a conversation's parts are its
turns."""
MAX_BLOCKS = 32
"""Longest beginnings of one prompt that are remembered."""
DOUBT_S = 2.0
"""Time for which a replica that failed a request gets others only if no other replica is left. One
that answers its failures at once would have the fewest requests in flight, and get all."""
SILENT_S = 60.0
"""Time for which a replica with requests in flight may send nothing before others are given the new
ones, as long as any other replica is heard: one that hangs would get its share, which is lost."""
INFO_LIMIT_S = 30.0
"""Time after which a replica that does not tell its state is one that does not serve; clients give
up after a minute."""
MAX_LOST = 2
"""Replicas that may lose one request before its client is told: the request may be what ends
them."""
PROMPTS = ("messages", "input_ids", "text", "prompt", "input")
"""Fields that hold a prompt, in the bodies of SGLang's routes."""
TO_ONE = (
    *("/", "/ping", "/health_generate", "/generate", "/encode", "/classify", "/invocations"),
    *("/tokenize", "/detokenize", "/parse_function_call", "/separate_reasoning"),
    *("/model_info", "/get_model_info", "/weight_version", "/get_weight_version"),
    *("/v1/models", "/v1/models/{path:path}", "/v1/chat/completions", "/v1/completions"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/embeddings"),
    *("/v1/tokenize", "/v1/detokenize", "/v1/score", "/v1/rerank", "/v1/classify"),
    "/v1/audio/transcriptions",
)
"""Routes that any replica can answer."""
TO_ALL = ("/abort_request", "/flush_cache")
"""Routes that every replica gets: a replica forgets an abort of a request that it has not."""
INFO = ("/server_info", "/get_server_info")
ADDED = ("max_running_requests", "max_total_num_tokens")
"""Limits in `/server_info` that are added up, beside LessIsMore's counters."""
NONE_LEFT = (
    "no replica is left that could answer: see the log of `lim serve`, and start it again if all "
    "have ended"
)

logger = logging.getLogger(__name__)


class Replica:
    """One server, and what is known of its load. It belongs to one event loop but for `is_lost`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.upstream = Upstream(url)
        self.in_flight = 0
        """Requests that were passed on and have not ended."""
        self.is_lost = False
        """True once the replica's processes have ended."""
        self.chosen = 0
        """Number of the newest choice of this replica, among all choices."""
        self._doubted_until_s = 0.0
        self._heard_s = 0.0
        """Time of the newest piece of an answer, or of the first request after none."""

    def begin_one(self, choice: int) -> None:
        """Note that a request is passed on, by the choice of this number."""
        if not self.in_flight:
            self.hear()
        self.in_flight += 1
        self.chosen = choice

    def hear(self) -> None:
        """Note a piece of an answer."""
        self._heard_s = time.monotonic()

    @property
    def is_silent(self) -> bool:
        """True for a replica that has long sent nothing for the requests that it has."""
        return bool(self.in_flight) and time.monotonic() > self._heard_s + SILENT_S

    @property
    def is_doubted(self) -> bool:
        """True for a short time after the replica failed a request."""
        return time.monotonic() < self._doubted_until_s

    def end_one(self, has_failed: bool = False) -> None:
        """Note the end of a request, and whether the replica failed the request."""
        self.in_flight -= 1
        if has_failed:
            self._doubted_until_s = time.monotonic() + DOUBT_S


class Balancer:
    """The replicas, and the choice among them."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Prepare the connections; nothing is sent yet."""
        self.replicas = tuple(map(Replica, urls))
        self._seen: OrderedDict[bytes, set[Replica]] = OrderedDict()
        """Digest of a prompt's beginning -> the replicas that were given it, newest last."""
        self._count = itertools.count(1)

    def lose(self, url: str) -> None:
        """Give a replica, whose processes have ended, no more requests; from any thread."""
        for replica in self.replicas:
            replica.is_lost |= replica.url == url

    def choose(self, keys: Sequence[bytes], tried: Iterable[Replica] = ()) -> Replica:
        """Choose the replica of a request, and count the request there.

        Args:
            keys: digests of the beginnings of its prompt, the longest last.
            tried: replicas that have lost this request.

        Raises:
            ServerError: no replica is left.
        """
        left = [each for each in self._serving() if each not in tried]
        left = [each for each in left if not each.is_silent] or left
        left = [each for each in left if not each.is_doubted] or left
        if not left:
            raise ServerError(NONE_LEFT)
        least = min(each.in_flight for each in left)
        seen = next((self._seen[key] for key in reversed(keys) if key in self._seen), set())
        near = [each for each in left if each in seen and each.in_flight < least + SLACK]
        found = min(near or left, key=lambda each: (each.in_flight, each.chosen))
        found.begin_one(next(self._count))
        self._remember(keys, found)
        return found

    def _serving(self) -> list[Replica]:
        return [each for each in self.replicas if not each.is_lost]

    def _remember(self, keys: Sequence[bytes], replica: Replica) -> None:
        for key in keys:
            self._seen.setdefault(key, set()).add(replica)
            self._seen.move_to_end(key)
        while len(self._seen) > MAX_KEYS:
            self._seen.popitem(last=False)

    async def to_one(self, request: Request) -> Response:
        """Answer with one replica's answer; a replica that dies before it answers has a second."""
        content = await request.body()
        keys = prompt_keys(content)
        return await cancel_on_disconnect(request, self._to_one(request, content, keys))

    async def _to_one(self, request: Request, content: bytes, keys: Sequence[bytes]) -> Response:
        tried: list[Replica] = []
        num_lost = 0
        while True:
            replica = self.choose(keys, tried)
            try:
                return await replica.upstream.forward(
                    request, content, replica.end_one, replica.hear
                )
            except httpx.RequestError as error:
                replica.end_one(has_failed=True)
                tried.append(replica)
                num_lost += not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if num_lost == MAX_LOST or set(self._serving()) <= set(tried):
                    urls = ", ".join(each.url for each in tried)
                    raise ServerError(
                        f"{urls} lost the request ({type(error).__name__}), which may be what "
                        "ends replicas: see the log of `lim serve`"
                    ) from None
                logger.warning(
                    "%s lost a request (%s): another replica gets it",
                    replica.url,
                    type(error).__name__,
                )
            except BaseException:
                replica.end_one()
                raise

    async def to_all(self, request: Request) -> Response:
        """Send a request to every replica; answer with the answer of the highest status."""
        content = await request.body()
        answers = await cancel_on_disconnect(request, self._to_all(request, content))
        return _whole(max(answers.values(), key=lambda answer: answer.status_code))

    async def _to_all(
        self, request: Request, content: bytes, limit_s: float | None = None
    ) -> dict[Replica, httpx.Response]:
        """Return the answers of the replicas that answer, within a time if there is a limit.

        Raises:
            httpx.RequestError: none does.
            ServerError: none is left.
        """
        replicas = self._serving()
        asked = (self._ask(each, request, content, limit_s) for each in replicas)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = dict(zip(replicas, answers, strict=True))
        answered = {each: got for each, got in found.items() if isinstance(got, httpx.Response)}
        if answered:
            return answered
        for error in answers:
            if isinstance(error, BaseException):
                raise error
        raise ServerError(NONE_LEFT)

    async def _ask(
        self, replica: Replica, request: Request, content: bytes, limit_s: float | None
    ) -> httpx.Response:
        try:
            async with asyncio.timeout(limit_s):
                answer = await replica.upstream.send(request, content)
                try:
                    await answer.aread()
                finally:
                    await answer.aclose()
        except TimeoutError:
            raise httpx.ReadTimeout(f"{replica.url} did not answer in {limit_s} s") from None
        return answer

    async def server_info(self, request: Request) -> Response:
        """Answer with the state of all replicas that serve, added up, and of each."""
        content = await request.body()
        asked = self._to_all(request, content, INFO_LIMIT_S)
        answers = await cancel_on_disconnect(request, asked)
        infos = {each.url: got.json() for each, got in answers.items() if got.is_success}
        if not infos:
            return _whole(next(iter(answers.values())))
        in_flight = {each.url: each.in_flight for each in self.replicas}
        return json_response(sum_infos(infos, in_flight))

    async def health(self, _: Request) -> Response:
        """Answer 200 if any replica is healthy, since requests are answered then, else 503."""
        replicas = self._serving()
        healthy = await asyncio.gather(*(each.upstream.is_healthy() for each in replicas))
        return Response(status_code=200 if any(healthy) else 503)

    async def refuse(self, request: Request) -> Response:
        """Refuse a route that changes, or shows, one server."""
        urls = ", ".join(each.url for each in self.replicas)
        raise HTTPException(
            404,
            f"{cut(request.url.path, 200)} is no route of all replicas: ask each of them itself, "
            f"on the server's own machine, at {urls}",
        )

    async def close(self) -> None:
        """Close all connections."""
        for replica in self.replicas:
            await replica.upstream.close()


def _whole(answer: httpx.Response) -> Response:
    """Return a replica's answer, which has been read, as ours."""
    kind = answer.headers.get("content-type")
    return Response(answer.content, answer.status_code, media_type=kind)


def prompt_keys(content: bytes) -> list[bytes]:
    """Return the digests of the beginnings of a request's prompt, the longest last; none without a
    prompt.

    Raises:
        ConfigError: the body is nested too deeply, or asks for an answer that one replica keeps.
    """
    try:
        body = parse_body(content)
    except NoJsonError:
        return []  # a form, a file, nothing: the replica says what it expects
    if not isinstance(body, dict):
        return []
    if body.get("previous_response_id") is not None:
        raise ConfigError(
            "previous_response_id: replicas do not know each other's answers; send the whole "
            "conversation as input"
        )
    if body.get("background"):
        raise ConfigError(
            "background: only one replica would have the answer, which could not be fetched; wait "
            "for the answer, or stream it"
        )
    digest, keys = hashlib.blake2b(digest_size=16), []
    for block in _blocks(next((body[name] for name in PROMPTS if body.get(name)), "")):
        digest.update(block)
        keys.append(digest.digest())
    return keys[-MAX_BLOCKS:]


def _blocks(prompt: Any) -> list[bytes]:
    """Return the parts of a prompt, as texts that are equal if and only if the parts are."""
    if not isinstance(prompt, str | list):
        return []
    size = BLOCK_CHARACTERS if isinstance(prompt, str) else 1
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        size = BLOCK_IDS
    parts = (prompt[begin : begin + size] for begin in range(0, len(prompt), size))
    return [json.dumps(part, sort_keys=True).encode() for part in parts]


def sum_infos(infos: Mapping[str, Any], in_flight: Mapping[str, int]) -> dict[str, Any]:
    """Return the `/server_info` of several replicas as that of one server.

    Args:
        infos: of the replicas that serve, by address.
        in_flight: requests of every replica that was started.
    """
    first = next(iter(infos.values()))
    total = dict(first)
    for name in ADDED:
        values = [info.get(name) for info in infos.values()]
        if all(isinstance(value, int) for value in values):
            total[name] = sum(values)
    states = {url: info.get("internal_states") or [{}] for url, info in infos.items()}
    state = dict(states[next(iter(states))][0])
    if live := lim_state({"internal_states": list(itertools.chain(*states.values()))}):
        alike = [(lim_state(info) or {}) for info in infos.values()]
        same = [(each.get("config"), each.get("roles")) for each in alike]
        replicas = {"replicas": len(in_flight), "live_replicas": same.count(same[0])}
        state["lim"] = live | replicas
    else:
        state.pop("lim", None)
    total["internal_states"] = [state]
    total["replicas"] = [
        {"url": url, "in_flight": count, "serves": url in infos, "states": states.get(url, [])}
        for url, count in in_flight.items()
    ]
    return total


def create_app(balancer: Balancer) -> ASGIApp:
    """Return the balancer as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await balancer.close()

    return words_as_answers(
        [
            Route("/health", balancer.health),
            *(Route(path, balancer.server_info, methods=("GET",)) for path in INFO),
            *(Route(path, balancer.to_all, methods=METHODS) for path in TO_ALL),
            *(Route(path, balancer.to_one, methods=METHODS) for path in TO_ONE),
            Route("/{path:path}", balancer.refuse, methods=METHODS),
        ],
        lifespan,
    )
