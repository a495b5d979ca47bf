"""Many streamed generations against one running server, as a user's clients would ask for them."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from lim_sglang.bench.load import Load
from lim_sglang.bench.streams import Stream
from lim_sglang.errors import ServerError

TICK_S = 0.2
"""How often the time limit is looked at."""
POLL_S = 1.0
"""How often the server is asked how full it is."""
STALL_S = 300.0
"""Without a token of any stream for so long, the server is given up."""
GOODBYE_S = 10.0
MAX_EVENT_BYTES = 1 << 20
"""A server that streams every token anew each time sends long lines."""
CONNECT_TIMEOUT_S = 10.0
LOADS_PATH = "/v1/loads?include=core"
"""Answered from what the scheduler writes down every 15 decode steps anyway."""


@dataclass(frozen=True)
class Occupancy:
    """How full the server was at one moment, by its own account."""

    at_s: float
    """On the client's clock."""
    running: int
    """Requests that are decoded."""
    waiting: int
    kv_tokens: int
    """Slots of the KV cache in use."""
    kv_share: float


@dataclass(frozen=True)
class Run:
    """What one load made of a server, as the client saw it."""

    streams: tuple[Stream, ...]
    occupancies: tuple[Occupancy, ...]
    cut: bool
    """It was ended before the last token."""
    client_share: float
    """Of one core, while the streams ran: near 1, the client may have been what was measured."""


@dataclass(frozen=True)
class Glance:
    """A run in progress."""

    num_tokens: int
    seconds: float
    """Since the first token; 0 before it."""
    last: Occupancy | None
    fewest: int = 0
    """Tokens of the stream that has the fewest."""


Watch = Callable[[Glance], bool | None]
"""Told of a run in progress; true ends it."""


def drive(
    url: str, load: Load, vocab_size: int, *, api_key: str | None = None, watch: Watch
) -> Run:
    """Send all requests of a load at once and read their streams to the end, or until they are cut.

    Args:
        url: of an idle server.
        watch: called several times a second; cuts the run when it returns true.

    Raises:
        ServerError: a request failed, ended early or was aborted, or no token came for long.
    """
    return asyncio.run(_drive(url, load, vocab_size, api_key, watch))


async def _drive(url: str, load: Load, vocab_size: int, api_key: str | None, watch: Watch) -> Run:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(
        url,
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=MAX_EVENT_BYTES,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
    ) as http:
        streams = [Stream() for _ in range(load.concurrency)]
        occupancies: list[Occupancy] = []
        bodies = _bodies(load, vocab_size)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        reading = [
            asyncio.create_task(_read(http, body, stream))
            for body, stream in zip(bodies, streams, strict=True)
        ]
        polling = asyncio.create_task(_poll(http, occupancies))
        try:
            cut = await _until_done(reading, polling, load, streams, occupancies, watch)
            seconds = time.perf_counter() - start_s
            client_share = (time.process_time() - start_cpu_s) / seconds
        finally:
            await _leave(http, bodies, streams, [*reading, polling])
    return Run(tuple(streams), tuple(occupancies), cut, client_share)


def _bodies(load: Load, vocab_size: int) -> list[dict[str, Any]]:
    """What is sent to `/generate`, request by request."""
    run_id = uuid.uuid4().hex
    sampling = {
        "temperature": 0,
        "max_new_tokens": load.new_tokens,
        "ignore_eos": True,
        "stream_interval": load.stream_interval,
    }
    return [
        {
            "rid": f"lim-{run_id}-{number}.",
            "input_ids": prompt,
            "sampling_params": sampling,
            "stream": True,
        }
        for number, prompt in enumerate(load.prompts(vocab_size))
    ]


async def _until_done(
    reading: Sequence[asyncio.Task[None]],
    polling: asyncio.Task[None],
    load: Load,
    streams: Sequence[Stream],
    occupancies: Sequence[Occupancy],
    watch: Watch,
) -> bool:
    """Wait for the streams to be read; whether they were cut."""
    tasks = [*reading, polling]
    first_s: float | None = None
    seen, news_s = 0, time.perf_counter()
    while not all(task.done() for task in reading):
        await asyncio.wait(tasks, timeout=TICK_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()  # raises what it failed with
        now_s = time.perf_counter()
        totals = [stream.num_tokens for stream in streams]
        num_tokens = sum(totals)
        if num_tokens > seen:
            seen, news_s = num_tokens, now_s
            first_s = first_s or now_s
        elif now_s - news_s > STALL_S:
            raise ServerError(f"no token came for {STALL_S:.0f} s: see the server's log")
        seconds = now_s - first_s if first_s else 0.0
        last = occupancies[-1] if occupancies else None
        enough = watch(Glance(num_tokens, seconds, last, min(totals)))
        if enough or (load.limit_s is not None and seconds >= load.limit_s):
            return not all(stream.finished for stream in streams)
    return False


async def _read(http: aiohttp.ClientSession, body: Mapping[str, Any], stream: Stream) -> None:
    """One request from sending to its last chunk."""
    rid = body["rid"]
    try:
        async with http.post("/generate", json=body) as response:
            if response.status != 200:
                text = (await response.text())[:200]
                raise ServerError(f"request {rid} was answered HTTP {response.status}: {text}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(stream, json.loads(line[6:]), rid)
    except (aiohttp.ClientError, ValueError, KeyError) as error:
        raise ServerError(
            f"the stream of request {rid} broke off ({type(error).__name__}: {error}): "
            "see the server's log"
        ) from None
    wanted = body["sampling_params"]["max_new_tokens"]
    if not stream.finished or stream.num_tokens != wanted:
        raise ServerError(
            f"request {rid} ended after {stream.num_tokens} of {wanted} tokens: see the "
            "server's log"
        )


def _take(stream: Stream, event: Mapping[str, Any], rid: str) -> None:
    """Note one event of a stream. `completion_tokens` counts right however the server streams."""
    if "error" in event:
        raise ServerError(f"request {rid} failed: {event['error'].get('message')}")
    meta = event["meta_info"]
    reason = meta.get("finish_reason")
    if reason and reason["type"] == "abort":
        raise ServerError(f"the server aborted request {rid}: {reason.get('message')}")
    stream.arrive(time.perf_counter(), meta["completion_tokens"])
    stream.retractions = meta.get("num_retractions") or 0
    stream.finished = bool(reason)


async def _poll(http: aiohttp.ClientSession, occupancies: list[Occupancy]) -> None:
    """Ask again and again how full the server is."""
    while True:
        try:
            async with http.get(LOADS_PATH) as response:
                response.raise_for_status()
                (load,) = (await response.json())["loads"]
        except (aiohttp.ClientError, ValueError, KeyError) as error:
            raise ServerError(
                f"the server does not say under {LOADS_PATH} how full it is "
                f"({type(error).__name__}: {error}): is it SGLang 0.5.16, with one scheduler?"
            ) from None
        occupancies.append(read_occupancy(load, time.perf_counter()))
        await asyncio.sleep(POLL_S)


def read_occupancy(load: Mapping[str, Any], at_s: float) -> Occupancy:
    """From one scheduler's entry under `/v1/loads`."""
    return Occupancy(
        at_s=at_s,
        running=load["num_running_reqs"],
        waiting=load["num_waiting_reqs"],
        kv_tokens=load["num_used_tokens"],
        kv_share=load["num_used_tokens"] / load["max_total_num_tokens"],
    )


async def _leave(
    http: aiohttp.ClientSession,
    bodies: Sequence[Mapping[str, Any]],
    streams: Sequence[Stream],
    tasks: Sequence[asyncio.Task[None]],
) -> None:
    """End what still runs: in the server, while it still knows the requests, then here."""
    left = [
        body["rid"] for body, stream in zip(bodies, streams, strict=True) if not stream.finished
    ]
    with suppress(aiohttp.ClientError, TimeoutError):  # the server is gone, the requests with it
        async with asyncio.timeout(GOODBYE_S):
            await asyncio.gather(*(_abort(http, rid) for rid in left))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _abort(http: aiohttp.ClientSession, rid: str) -> None:
    async with http.post("/abort_request", json={"rid": rid}):
        pass
