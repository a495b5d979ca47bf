"""A server that speaks as much of SGLang's HTTP as a program needs, and fails on request."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.programs.chains import CUT, Chain, Raw, Said, as_event, words

Reply = tuple[int, Any]
Answerer = Callable[[dict[str, Any]], Reply | Chain]
"""What to say to a request; has a thread of its own, so it may wait."""

POLL_S = 0.003
"""Between two looks at what a generation waits for."""


def completion(text: str, *, num_tokens: int = 7, reason: str = "stop") -> Reply:
    """A finished chat completion; streamed where that is asked for."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": num_tokens}}


@dataclass
class _Live:
    """A request that has not ended."""

    aborted: bool = False


class _Peer:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def is_gone(self) -> bool:
        """Whether the client has hung up."""
        lost = self._reader.at_eof() or self._reader.exception() is not None
        return lost or self._writer.is_closing()

    async def read(self) -> tuple[str, dict[str, Any]]:
        """Path and body of the next request."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, *headers = head.lower().split("\r\n")
        sizes = [line.partition(":")[2] for line in headers if line.startswith("content-length:")]
        body = await self._reader.readexactly(int(sizes[0])) if sizes else b""
        return request.split()[1], json.loads(body or b"{}")

    async def send_json(self, status: int, content: Any) -> None:
        """A whole reply."""
        payload = json.dumps(content).encode()
        head = f"Content-Type: application/json\r\nContent-Length: {len(payload)}"
        await self._send(f"HTTP/1.1 {status} -\r\n{head}\r\n\r\n".encode() + payload)

    async def begin_stream(self) -> None:
        """The head of a reply that comes in chunks."""
        head = "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked"
        await self._send(f"HTTP/1.1 200 -\r\n{head}\r\n\r\n".encode())

    async def chunk(self, content: bytes) -> None:
        """One chunk; an empty one is the last."""
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
    """What it was asked, and how it answers."""

    answer: Answerer
    url: str = ""
    deterministic: bool = False
    max_running_requests: int | None = None
    tokenizes: bool = True
    """Otherwise it has no tokenizer to ask."""
    switches_thoughts: bool = True
    """Whether its chat template has a switch for thoughts."""
    forgets_aborts: int = 0
    """So many aborts overtake their requests."""
    answers_aborts: bool = True
    """Otherwise it neither answers them nor heeds them."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of all chat completions that were asked for."""
    paths: list[str] = field(default_factory=list)
    """Of all that was asked for."""
    aborted: list[str] = field(default_factory=list)
    """The id of each abort that was asked for."""
    hung_up: list[str] = field(default_factory=list)
    """Ids of requests whose clients closed the connection; that ends them, as at SGLang."""
    in_flight: int = 0
    most_running: int = 0
    num_tokens: int = 0
    """Said so far in all chains."""
    _live: dict[str, _Live] = field(default_factory=dict)
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
        """`kill`, and end the thread."""
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
                path, body = await peer.read()
                await self._reply(path, body, peer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has hung up
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
        elif path == "/server_info":
            await peer.send_json(200, self._about())
        else:
            found = path == "/model_info"
            await peer.send_json(200 if found else 404, {} if found else {"detail": "Not Found"})

    def _tokens(self, body: dict[str, Any]) -> list[str]:
        """A word is a token."""
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
            "internal_states": [{}],
        }

    def _abort(self, rid: str) -> None:
        """As SGLang: an unknown id is forgotten; a known one ends all that begin with it."""
        if not self.answers_aborts or rid not in self._live:
            return
        if self.forgets_aborts:
            self.forgets_aborts -= 1
            return
        for known, live in self._live.items():
            live.aborted |= known.startswith(rid)

    async def _complete(self, body: dict[str, Any], peer: _Peer) -> None:
        rid = body.get("rid") or uuid.uuid4().hex
        live = self._live[rid] = _Live()
        self.requests.append(body)
        self.in_flight += 1
        self.most_running = max(self.most_running, self.in_flight)
        try:
            said = Said(body, rid)
            answer = self._loop.run_in_executor(self._threads, self.answer, body)
            await _until(lambda: answer.done() or live.aborted or peer.is_gone)
            reply = await answer if answer.done() else Chain(())
            if not isinstance(reply, Chain):
                reply = _streamed(reply) if body.get("stream") else reply
            if isinstance(reply, Chain):
                await self._generate(reply, said, live, peer)
            else:
                await peer.send_json(*reply)
        finally:
            if peer.is_gone:
                self.hung_up.append(rid)
            self.in_flight -= 1
            del self._live[rid]

    async def _generate(self, chain: Chain, said: Said, live: _Live, peer: _Peer) -> None:
        stream = bool(said.body.get("stream"))
        await _until(lambda: _is_set(chain.after) or live.aborted or peer.is_gone)
        if stream:
            await peer.begin_stream()
        for place, piece in enumerate(chain.pieces):
            if live.aborted or peer.is_gone:
                break
            await asyncio.sleep(chain.pace_s)
            if piece is CUT:
                peer.cut()
                return
            if stream and not said.num_tokens:
                await peer.chunk(as_event(said.first_chunk()))
            if isinstance(piece, Raw):
                await peer.chunk(f"{piece.text}\n\n".encode())
                continue
            confidences = chain.confidences
            said.add(piece, confidences[place] if place < len(confidences) else 1.0)
            self.num_tokens += 1
            if stream and piece:
                await peer.chunk(as_event(said.chunk(piece)))
        await _until(lambda: _is_set(chain.until) or live.aborted or peer.is_gone)
        reason = "abort" if live.aborted else chain.reason
        if not stream:
            await peer.send_json(200, said.whole(reason))
            return
        events = [] if said.num_tokens else [said.first_chunk()]
        for event in (*events, *said.last_chunks(reason)):
            await peer.chunk(as_event(event))
        await peer.chunk(b"data: [DONE]\n\n")
        await peer.chunk(b"")


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
    """Whether something becomes true before the time is up."""
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


def _streamed(reply: Reply) -> Reply | Chain:
    """A completion as a chain; what is none stays as it is."""
    with suppress(KeyError, IndexError, TypeError):
        choice, usage = reply[1]["choices"][0], reply[1]["usage"]
        text, num_tokens = choice["message"]["content"], usage["completion_tokens"]
        return Chain(words(text, num_tokens), choice["finish_reason"])
    return reply
