"""Real SGLang servers on the CPU: started as a user does it, asked over HTTP, ended as a tree."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import psutil

from lim_sglang.launch.server import free_port
from lim_sglang.launch.supervisor import is_running, remove_stale_folders
from tests.forked_commands import ROOT, SERVER, Command, Forker, forking
from tests.server.oracle import KeptSets, OracleRun
from tests.server.tiny_model import BUDGET, NUM_NEW, SELECT_LAYERS, Prompt

SGLANG = (sys.executable, "-m", "sglang.launch_server")
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
LIM_SERVE = (sys.executable, "-m", "lim_sglang", "serve")
LAUNCH = (str(ROOT / "launch.sh"), "--no-install")
"""`lim serve` by the python3 on the PATH, which is the one that runs the tests."""

ON_CPU = (
    *("--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3"),
    # Room for all long requests at once, and chunks that cut each of their prompts.
    *("--max-total-tokens", "16384", "--max-running-requests", "16", "--context-length", "4096"),
    *("--chunked-prefill-size", "512", "--sleep-on-idle"),
)

WITH_LIM = (
    *("--attention-backend", "lim", "--lim-budget", str(BUDGET)),
    *("--lim-select-layers", ",".join(map(str, SELECT_LAYERS))),
)
"""Options for the tiny model."""

CHECKS = {
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}
"""SGLang's own checks of its slots, which end a server that fails them."""
READY_TIMEOUT_S = 600
REQUEST_TIMEOUT_S = 300
LOG_TAIL = 4000
"""Characters of a log that a failed start shows."""


@dataclass(frozen=True)
class Answer:
    """A server's answer to one request."""

    rid: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was in the radix cache."""
    finish: str
    """`length`, `stop` or `abort`."""

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> "Answer":
        """Read one result of `/generate`."""
        meta = result["meta_info"]
        return cls(
            rid=meta["id"],
            tokens=tuple(result["output_ids"]),
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            finish=(meta["finish_reason"] or {}).get("type", ""),
        )


class Client:
    """A client that asks one server greedily, through end tokens, over SGLang's native API."""

    def __init__(self, url: str, trace: Path, api_key: str | None = None) -> None:
        self.url = url
        self._trace = trace
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=REQUEST_TIMEOUT_S,
            trust_env=False,
        )

    def is_ready(self) -> bool:
        """Return True if the server takes requests."""
        try:
            return self._http.get("/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def ask(self, prompt: Prompt, num_tokens: int = NUM_NEW) -> Answer:
        """Generate for one prompt that is alone in the server."""
        return self.ask_together([prompt], num_tokens)[0]

    def ask_together(self, prompts: Sequence[Prompt], num_tokens: int = NUM_NEW) -> list[Answer]:
        """Generate for all prompts at once."""
        body = _request(list(prompts), [new_rid() for _ in prompts], num_tokens)
        return [Answer.from_result(result) for result in self._post("/generate", body)]

    def ask_sampled(
        self, prompts: Sequence[Prompt], seeds: Sequence[int | None], **sampling: float
    ) -> list[Answer]:
        """Sample an answer to each prompt with its seed, at once; `n` asks for several a prompt."""
        body = {"input_ids": list(prompts), "sampling_params": []}
        for seed in seeds:
            given = {"max_new_tokens": NUM_NEW, "ignore_eos": True, "sampling_seed": seed}
            body["sampling_params"].append(given | sampling)
        return [Answer.from_result(result) for result in self._post("/generate", body)]

    def ask_cold(self, prompts: Sequence[Prompt], *, together: bool) -> list[Answer]:
        """Generate for all prompts, at once or one by one, from an empty radix cache."""
        # An answer may come before its request's end, so the server gets time to become idle.
        self._http.post("/flush_cache?timeout=20").raise_for_status()
        return self.ask_together(prompts) if together else [self.ask(p) for p in prompts]

    def ask_copies(self, prompt: Prompt, num_copies: int) -> list[Answer]:
        """Generate n samples in one request."""
        body = _request(prompt, None, NUM_NEW)
        body["sampling_params"]["n"] = num_copies
        return [Answer.from_result(result) for result in self._post("/generate", body)]

    def stream(self, prompt: Prompt, rid: str, num_tokens: int) -> Iterator[Answer]:
        """Generate for one prompt; yield the answer so far after every few tokens."""
        body = _request(prompt, rid, num_tokens) | {"stream": True}
        with self._http.stream("POST", "/generate", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield Answer.from_result(json.loads(line.removeprefix("data: ")))

    def chat(self, text: str, num_tokens: int) -> dict[str, Any]:
        """Return the OpenAI API's answer to one user message."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": num_tokens}
        answer: dict[str, Any] = self._post("/v1/chat/completions", body)
        return answer

    def abort(self, rid: str) -> None:
        """End one request in mid-stream."""
        self._http.post("/abort_request", json={"rid": rid}).raise_for_status()

    def lim(self) -> dict[str, Any]:
        """Return LessIsMore's part of `/server_info`."""
        response = self._http.get("/server_info")
        state: dict[str, Any] = response.json()["internal_states"][0]["lim"]
        return state

    def kept_sets(self, answer: Answer) -> KeptSets:
        """Return the sets that led to the answer's tokens.

        SGLang overlaps its steps: it learns that a request has ended one step late, so the server
        also decodes the last token and drops the result. That row is left out.
        """
        return kept_sets(self._trace, answer)

    def kept_by_rank(self, answer: Answer) -> list[KeptSets]:
        """Return the sets that each rank of tensor parallelism has written for an answer."""
        return [kept_sets(file, answer) for file in trace_files(self._trace)]

    def steps(self, rid: str) -> dict[int, int]:
        """Return a request's length at each decode step in which it had a sparse row."""
        return {line["step"]: line["seq_len"] for line in _read_trace(self._trace, rid)}

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._http.post(path, json=body).raise_for_status().json()


def kept_sets(trace: Path, answer: Answer) -> KeptSets:
    """Return the sets that led to an answer's tokens.

    Args:
        trace: a folder of traces, or one of its files.
    """
    last = answer.prompt_tokens + len(answer.tokens) - 1
    return {
        (line["seq_len"], line["layer"]): tuple(map(tuple, line["kept"]))
        for line in _read_trace(trace, answer.rid)
        if line["seq_len"] <= last
    }


def trace_files(trace: Path) -> list[Path]:
    """Return the files of a folder of traces by rank, or the one file that is named."""
    return [trace] if trace.is_file() else sorted(trace.glob("kept-*.jsonl"))


def _read_trace(trace: Path, rid: str) -> list[dict[str, Any]]:
    """Read the kept sets of one request that a server has written so far."""
    files = trace_files(trace)
    lines = (json.loads(line) for file in files for line in file.read_text().splitlines())
    return [line for line in lines if line["rid"] == rid]


def new_rid() -> str:
    """Return a request id that is no other's prefix."""
    return f"{uuid.uuid4().hex}."


def _request(ids: Any, rid: Any, num_tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": ids, "rid": rid, "sampling_params": sampling}


def disagreements(
    server: Client, answers: Sequence[Answer], runs: Sequence[OracleRun]
) -> list[str]:
    """Return a line for each request whose tokens or kept sets are not exactly the oracle's."""
    return [
        f"prompt of {answer.prompt_tokens} tokens: {text}"
        for answer, run in zip(answers, runs, strict=True)
        for text in (
            *token_differences(answer.tokens, run.tokens),
            *set_differences(server.kept_sets(answer), run.kept),
        )
    ]


def token_differences(served: Sequence[int], expected: Sequence[int]) -> list[str]:
    """Return at most one line: the first position where two outputs differ."""
    if tuple(served) == tuple(expected):
        return []
    same = [left == right for left, right in zip(served, expected, strict=False)]
    first = same.index(False) if False in same else len(same)
    return [f"tokens differ from {first} on ({len(served)} against {len(expected)})"]


def set_differences(served: KeptSets, expected: KeptSets) -> list[str]:
    """Return at most one line: the first row that is missing, extra, or kept other tokens."""
    wrong = sorted(
        row for row in served.keys() | expected.keys() if served.get(row) != expected.get(row)
    )
    if not wrong:
        return []
    length, layer = wrong[0]
    lists = zip_longest(served.get(wrong[0], ()), expected.get(wrong[0], ()), fillvalue=())
    unshared = [sorted(set(found) ^ set(wanted))[:8] for found, wanted in lists]
    return [
        f"{len(wrong)} of {len(expected)} sets differ, first at length {length}, layer {layer}: "
        f"positions {unshared}"
    ]


@dataclass(frozen=True)
class Ending:
    """The end of a server after a signal."""

    code: int | None
    """Exit code of the main process; None if it still ran."""
    left: tuple[str, ...]
    """Processes of the tree that still ran."""


class LocalServer(Client):
    """A client whose server is a child of this process."""

    def __init__(
        self,
        port: int,
        trace: Path,
        api_key: str | None,
        process: subprocess.Popen[bytes] | Command,
    ) -> None:
        super().__init__(f"http://127.0.0.1:{port}", trace, api_key)
        self.port = port
        self._process = process

    @property
    def pid(self) -> int:
        """The process id of the server's main process."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Return True if the server's main process has not ended."""
        return self._process.poll() is None

    def tree(self) -> list[psutil.Process]:
        """Return the main process and all that it started."""
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def kill(self) -> None:
        """End the whole process tree at once, as a crash would."""
        end_tree(self._process)

    def end_by(self, number: signal.Signals, timeout_s: float) -> Ending:
        """Send a signal to the main process; wait until the tree has ended, or the time is over."""
        tree = self.tree()
        self._process.send_signal(number)
        left = still_running(tree, timeout_s)
        for member in left:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        return Ending(self._process.poll(), tuple(map(str, left)))


@contextmanager
def serving(
    command: Sequence[str], *, folder: Path, settings: Mapping[str, str] | None = None
) -> Iterator[LocalServer]:
    """Run a server on a free port until the block ends.

    Its output goes to `folder`/server.log, its kept sets to `folder`/trace.

    Args:
        settings: environment variables; each request sends the `LIM_API_KEY` among them.

    Raises:
        AssertionError: the server ended or was not ready in time; the end of its log is quoted.
    """
    settings = settings or {}
    port, log, trace = free_port(), folder / "server.log", folder / "trace"
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    environment = clean_environment({"LIM_TRACE": str(trace), **settings})
    process = _start(words, environment, log, is_forked=is_plain(command, settings))
    server = LocalServer(port, trace, settings.get("LIM_API_KEY"), process)
    try:
        _wait_until_ready(server, process, log)
        yield server
    finally:
        end_tree(process)


def is_plain(command: Sequence[str], settings: Mapping[str, str]) -> bool:
    """Return True for `python -m sglang.launch_server` without settings that SGLang's modules read
    when they are imported.
    """
    is_read_later = all(name.startswith("LIM_") or name in CHECKS for name in settings)
    return tuple(command[: len(SGLANG)]) == SGLANG and is_read_later


def _start(
    words: Sequence[str], environment: Mapping[str, str], log: Path, *, is_forked: bool
) -> subprocess.Popen[bytes] | Command:
    """Start a server whose output goes to a log; forked, it shares one import with others."""
    if is_forked:
        streams = (log.name, log.name)
        rest = words[1:]  # without the interpreter
        return _forker().start(log.parent, *rest, streams=streams, environment=environment)
    with log.open("w") as output:
        return subprocess.Popen(
            words,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@cache
def _forker() -> Forker:
    """Return the process that forks servers until this one ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(forking(SERVER, clean_environment({})))


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment, with `settings` for all variables of SGLang and lim.

    One thread a process: models are small, and a server's processes share two cores with the tests.
    """
    steering, left = ("LIM_", "SGLANG_"), ("LIM_CACHE", "LIM_ALLOW_SGLANG")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering) or k in left}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    steered = {"PATH": path, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    steered["OMP_NUM_THREADS"] = "1"
    return {**kept, **steered, **settings}


def end_tree(process: subprocess.Popen[bytes] | Command) -> None:
    """Kill a process that leads its own session, and every process that it started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    with suppress(ProcessLookupError):  # children whose parent died before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    remove_stale_folders(Path(tempfile.gettempdir()))  # a killed `lim serve` among them


def still_running(tree: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until processes have ended, or the time is over; return those that still run."""
    deadline = time.monotonic() + timeout_s
    while (left := [each for each in tree if is_running(each)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _wait_until_ready(
    client: Client, process: subprocess.Popen[bytes] | Command, log: Path
) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not client.is_ready():
        tail = log.read_text()[-LOG_TAIL:]
        assert (code := process.poll()) is None, f"the server ended with code {code}:\n{tail}"
        assert time.monotonic() < deadline, f"not ready in {READY_TIMEOUT_S} s:\n{tail}"
        time.sleep(0.5)
