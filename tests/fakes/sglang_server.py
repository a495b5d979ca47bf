"""A server that speaks as much of SGLang's HTTP as a program needs, and fails on request.

Its chat completions have the shapes of SGLang 0.5.16 (`serving_chat.py`).
"""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

END_OF_TURN = 151645
PROMPT_TOKENS = 11
CHUNK = "chat.completion.chunk"
POLL_S = 0.003
"""Pause between two looks at the events that a generation waits for."""


@dataclass(frozen=True)
class Raw:
    """Text that is sent in a stream as it is, in place of a token."""

    text: str = ""


CUT = Raw()
"""Breaks the connection off."""


@dataclass(frozen=True)
class Chain:
    """A generation, token by token."""

    pieces: Sequence[str | Raw]
    """Text of each token; a token without text is counted and not sent, as SGLang does."""
    reason: str = "stop"
    """Why it ends, unless it is aborted."""
    confidences: Sequence[float] = ()
    """DeepConf's confidence of each token; 1 for those beyond the sequence."""
    pace_s: float = 0.0
    """Pause before each token."""
    after: threading.Event | None = None
    """The first token waits for this event."""
    until: threading.Event | None = None
    """The end waits for this event."""


Reply = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]
"""Status, content and headers of an answer that is sent as it is."""
Answerer = Callable[[dict[str, Any]], Reply | Chain]
"""Returns the answer to a request; runs in a thread of its own, so it may wait."""


def endless(*pieces: str, **options: Any) -> Chain:
    """Return a generation that never ends by itself."""
    return Chain(pieces, until=threading.Event(), **options)


def words(text: str, num_tokens: int) -> tuple[str, ...]:
    """Return a text as this number of tokens, all of it in the first."""
    return (text, *[""] * (num_tokens - 1))


def completion(text: str, *, num_tokens: int = 7, reason: str = "stop") -> Chain:
    """Return a generation that has its whole text at once."""
    return Chain(words(text, num_tokens), reason)


@dataclass
class Output:
    """The output of a generation so far, in SGLang's shapes."""

    body: Mapping[str, Any]
    rid: str
    text: str = ""
    num_tokens: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, piece: str, confidence: float) -> None:
        """Add a token."""
        self.text += piece
        self.num_tokens += 1
        if self.body.get("logprobs"):
            self.logprobs.append(_logprob(piece, confidence, self.body["top_logprobs"]))

    def complete(self, reason: str) -> dict[str, Any]:
        """Return the answer to a request that is not streamed."""
        message = {
            "role": "assistant",
            "content": self.text,
            "reasoning_content": None,
            "tool_calls": None,
        }
        logprobs = {"content": self.logprobs} if self.body.get("logprobs") else None
        choice = {"index": 0, "message": message, "logprobs": logprobs, **_ending(reason)}
        rest = {"usage": self.usage(), "metadata": {"weight_version": "default"}}
        return self._head("chat.completion") | {"choices": [choice]} | rest

    def first_chunk(self) -> dict[str, Any]:
        """Return the chunk that comes with the first token, before its text."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, piece: str) -> dict[str, Any]:
        """Return the chunk of the token that was added last."""
        logprobs = {"content": self.logprobs[-1:]} if self.logprobs else None
        continuous = (self.body.get("stream_options") or {}).get("continuous_usage_stats")
        usage = {"usage": self.usage()} if continuous else {}
        return self._chunk({"content": piece}, logprobs) | usage

    def last_chunks(self, reason: str) -> list[dict[str, Any]]:
        """Return the chunks with the reason of the end and with the usage."""
        chunks = [self._chunk({}, ending=_ending(reason))]
        if (self.body.get("stream_options") or {}).get("include_usage"):
            chunks.append(self._head(CHUNK) | {"choices": [], "usage": self.usage()})
        return chunks

    def usage(self) -> dict[str, Any]:
        """Return the tokens so far."""
        return {
            "prompt_tokens": PROMPT_TOKENS,
            "total_tokens": PROMPT_TOKENS + self.num_tokens,
            "completion_tokens": self.num_tokens,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.rid, "object": kind, "created": 1, "model": self.body.get("model")}

    def _chunk(
        self,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
        ending: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        delta = {"reasoning_content": None, **delta}
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, **(ending or _ending(None))}
        return self._head(CHUNK) | {"choices": [choice]}


def as_event(content: Mapping[str, Any]) -> bytes:
    """Return an event of a stream, encoded as SGLang does: no character is escaped without need."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _ending(reason: str | None) -> dict[str, Any]:
    matched = END_OF_TURN if reason == "stop" else None
    return {"finish_reason": reason, "matched_stop": matched}


def _logprob(piece: str, confidence: float, candidates: int) -> dict[str, Any]:
    """Return the logprobs of a token whose candidates are equally likely: their mean is exact."""
    entries = []
    for number in range(candidates):
        token = f"{piece}{number or ''}"
        entries.append({"token": token, "bytes": list(token.encode()), "logprob": -confidence})
    return entries[0] | {"top_logprobs": entries}


@dataclass
class _Request:
    """A request that has not ended."""

    aborted: bool = False


class _Peer:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def is_gone(self) -> bool:
        """True if the client has disconnected."""
        lost = self._reader.at_eof() or self._reader.exception() is not None
        return lost or self._writer.is_closing()

    async def read(self) -> tuple[str, bytes]:
        """Return path and body of the next request."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, *headers = head.lower().split("\r\n")
        sizes = [line.partition(":")[2] for line in headers if line.startswith("content-length:")]
        body = await self._reader.readexactly(int(sizes[0])) if sizes else b""
        return request.split()[1], body

    async def send_json(
        self, status: int, content: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a complete reply."""
        payload = json.dumps(content).encode()
        head = f"Content-Type: application/json\r\nContent-Length: {len(payload)}"
        head += "".join(f"\r\n{name}: {value}" for name, value in (headers or {}).items())
        await self._send(f"HTTP/1.1 {status} -\r\n{head}\r\n\r\n".encode() + payload)

    async def begin_stream(self) -> None:
        """Send the head of a reply that comes in chunks."""
        head = "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked"
        await self._send(f"HTTP/1.1 200 -\r\n{head}\r\n\r\n".encode())

    async def send_chunk(self, content: bytes) -> None:
        """Send a chunk; an empty one is the last."""
        await self._send(b"%x\r\n%s\r\n" % (len(content), content))

    def cut(self) -> None:
        """Break the connection off."""
        self._writer.transport.abort()

    async def _send(self, content: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(content)
            await self._writer.drain()


@dataclass
class FakeServer:
    """A fake server: its answers, and the requests that it got."""

    answer: Answerer
    url: str = ""
    deterministic: bool = False
    max_running_requests: int | None = None
    drafts: bool = False
    """True if it counts lossless drafting."""
    models: tuple[str, ...] = ()
    """Ids of the models that it lists; none: it has no such route."""
    tokenizes: bool = True
    """False: it has no tokenizer."""
    switches_thoughts: bool = True
    """True if its chat template has a switch for thoughts."""
    ends_thoughts: bool = True
    """True if its tokenizer has a token that ends thoughts."""
    forgets_aborts: int = 0
    """Number of aborts that overtake their requests."""
    answers_aborts: bool = True
    """False: it neither answers nor obeys aborts."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of all chat completions."""
    paths: list[str] = field(default_factory=list)
    """Paths of all requests."""
    aborted: list[str] = field(default_factory=list)
    """The id of each abort."""
    disconnected: list[str] = field(default_factory=list)
    """Ids of requests whose clients closed the connection; that ends them, as at SGLang."""
    in_flight: int = 0
    most_running: int = 0
    num_tokens: int = 0
    """Tokens generated so far in all chains."""
    _live: dict[str, _Request] = field(default_factory=dict)
    _peers: set[_Peer] = field(default_factory=set)
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(128))
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _server: asyncio.Server | None = None

    def start(self) -> None:
        """Serve on a free port, from a thread of its own."""
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def kill(self) -> None:
        """Break all connections off and take no more."""
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()

    def stop(self) -> None:
        """Do the same, and end the thread."""
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _hang_up(self) -> None:
        assert self._server
        self._server.close()
        for peer in self._peers:
            peer.cut()
        while self._peers:
            await asyncio.sleep(POLL_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _Peer(reader, writer)
        self._peers.add(peer)
        try:
            while True:
                path, content = await peer.read()
                try:
                    await self._reply(path, json.loads(content or b"{}"), peer)
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    await peer.send_json(400, {"object": "error", "message": repr(error)})
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has disconnected
        finally:
            self._peers.discard(peer)
            writer.close()

    async def _reply(self, path: str, body: dict[str, Any], peer: _Peer) -> None:
        self.paths.append(path)
        if path == "/v1/chat/completions":
            await self._complete(body, peer)
        elif path == "/abort_request":
            self.aborted.append(body["rid"])
            if not self.answers_aborts:
                await _until(lambda: peer.is_gone)
            self._abort(body["rid"])
            await peer.send_json(200, {})
        elif path == "/v1/tokenize" and self.tokenizes:
            tokens = self._tokens(body)
            await peer.send_json(200, {"tokens": tokens, "count": len(tokens)})
        elif path == "/v1/models" and self.models:
            cards = [{"id": name, "object": "model"} for name in self.models]
            await peer.send_json(200, {"object": "list", "data": cards})
        elif path == "/server_info":
            await peer.send_json(200, self._about())
        elif path == "/model_info":
            await peer.send_json(200, {"model_path": "/models/fake"})
        else:
            await peer.send_json(404, {"detail": "Not Found"})

    def _tokens(self, body: dict[str, Any]) -> list[str]:
        """Return the tokens of a text or a conversation: a word each."""
        if body.get("prompt") == "</think>" and not self.ends_thoughts:
            return ["</", "think", ">"]
        if "prompt" in body:
            return list(body["prompt"].split())
        switch = body.get("chat_template_kwargs", {}) if self.switches_thoughts else {}
        return [*body["messages"][-1]["content"].split(), *(f"{n}={v}" for n, v in switch.items())]

    def _about(self) -> dict[str, Any]:
        return {
            "model_path": "/models/fake",
            "version": "0.5.16",
            "enable_deterministic_inference": self.deterministic,
            "max_running_requests": self.max_running_requests,
            "internal_states": [self._drafting() if self.drafts else {}],
        }

    def _drafting(self) -> dict[str, Any]:
        """Return counts as if each request had five cycles, and twenty before the first."""
        cycles = 20 + 5 * len(self.requests)
        counts = {"cycles": cycles, "drafted_tokens": 8 * cycles, "accepted_tokens": 6 * cycles}
        return {
            "lim": {**counts, "accepted_histogram": {"6": cycles}, "cycles_by_width": {"9": cycles}}
        }

    def _abort(self, rid: str) -> None:
        """Abort as SGLang: an unknown id is forgotten, a known one ends all that begin with it."""
        if not self.answers_aborts or rid not in self._live:
            return
        if self.forgets_aborts:
            self.forgets_aborts -= 1
            return
        for known, request in self._live.items():
            request.aborted |= known.startswith(rid)

    async def _complete(self, body: dict[str, Any], peer: _Peer) -> None:
        rid = body.get("rid") or uuid.uuid4().hex
        request = self._live[rid] = _Request()
        self.requests.append(body)
        self.in_flight += 1
        self.most_running = max(self.most_running, self.in_flight)
        try:
            output = Output(body, rid)
            answer = self._loop.run_in_executor(self._threads, self.answer, body)
            while not (answer.done() or request.aborted or peer.is_gone):
                await asyncio.wait({answer}, timeout=POLL_S)
            reply = await answer if answer.done() else Chain(())
            if isinstance(reply, Chain):
                await self._generate(reply, output, request, peer)
            else:
                await peer.send_json(*reply)
        finally:
            if peer.is_gone:
                self.disconnected.append(rid)
            self.in_flight -= 1
            del self._live[rid]

    async def _generate(self, chain: Chain, output: Output, request: _Request, peer: _Peer) -> None:
        stream = bool(output.body.get("stream"))
        await _until(lambda: _is_set(chain.after) or request.aborted or peer.is_gone)
        if stream:
            await peer.begin_stream()
        for number, piece in enumerate(chain.pieces):
            if request.aborted or peer.is_gone:
                break
            await asyncio.sleep(chain.pace_s)
            if piece is CUT:
                peer.cut()
                return
            if stream and not output.num_tokens:
                await peer.send_chunk(as_event(output.first_chunk()))
            if isinstance(piece, Raw):
                await peer.send_chunk(f"{piece.text}\n\n".encode())
                continue
            confidences = chain.confidences
            output.add(piece, confidences[number] if number < len(confidences) else 1.0)
            self.num_tokens += 1
            if stream and piece:
                await peer.send_chunk(as_event(output.chunk(piece)))
        await _until(lambda: _is_set(chain.until) or request.aborted or peer.is_gone)
        reason = "abort" if request.aborted else chain.reason
        if not stream:
            await peer.send_json(200, output.complete(reason))
            return
        events = [] if output.num_tokens else [output.first_chunk()]
        for event in (*events, *output.last_chunks(reason)):
            await peer.send_chunk(as_event(event))
        await peer.send_chunk(b"data: [DONE]\n\n")
        await peer.send_chunk(b"")


@contextmanager
def serving(answer: Answerer, **options: Any) -> Iterator[FakeServer]:
    """Run a fake server on a free port until the block ends."""
    fake = FakeServer(answer, **options)
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()


def eventually(holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Return True once something is true, False if the time is up before."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_set(event: threading.Event | None) -> bool:
    return event is None or event.is_set()


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(POLL_S)
