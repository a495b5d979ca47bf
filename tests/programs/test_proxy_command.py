"""`lim proxy` as a command: it starts, answers, and ends without leaving anything behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from lim_sglang.programs.proxy.command import samples_limit
from tests.fakes.sglang_server import Chain, endless, eventually, serving
from tests.forked_commands import Command, Forker

QUESTION: list[Any] = [{"role": "user", "content": "What is 17 * 23?"}]
LONG: list[Any] = [{"role": "user", "content": "long"}]


def answer(body: dict[str, Any]) -> Chain:
    """Answer a short question; a long one has no end."""
    return endless("let me") if body["messages"] == LONG else Chain(("so \\boxed{391}",))


def start(forker: Forker, folder: Path, url: str) -> tuple[Command, str]:
    """Start a proxy in front of a server; return it with its base URL once it is ready."""
    command = forker.start(folder, "proxy", "--url", f"{url}/v1", "--port", "0")
    assert eventually(lambda: "kill " in command.output, 60), command.error
    found = re.search(r"base url  (\S+)", command.output)
    assert found
    return command, found[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_and_ends_at_once_with_all_samples_in_flight(
    number: signal.Signals, forker: Forker, tmp_path: Path
) -> None:
    def ask(stream: bool) -> tuple[int, str]:
        body = {"model": "majority@4", "messages": LONG, "stream": stream}
        reply = httpx.post(f"{base_url}/chat/completions", json=body, timeout=30)
        return reply.status_code, reply.text

    with serving(answer) as fake, ThreadPoolExecutor(2) as pool:
        command, base_url = start(forker, tmp_path, fake.url)
        assert f"kill {command.pid}\n" in command.output
        assert f"server    {fake.url}\n" in command.output
        limits = dict(line.split(maxsplit=1) for line in command.output.splitlines() if line)
        assert "16 at once (--max-questions), 64 " in limits["questions"]
        assert limits["samples"].startswith("64 at once")
        assert limits["threads"].startswith("112 ")
        chat = openai.OpenAI(base_url=base_url, api_key="none").chat.completions
        vote: Any = chat.create(model="majority@3", messages=QUESTION)
        assert vote.lim["votes"][0]["votes"] == 3
        answers = [pool.submit(ask, stream) for stream in (False, True)]
        assert eventually(lambda: fake.in_flight == 8)
        start_s = time.monotonic()
        command.send(number)
        refusals = [future.result(30) for future in answers]
        assert eventually(lambda: fake.in_flight == 0, 1.0)
        assert time.monotonic() - start_s < 3
        assert len(set(fake.aborted)) == 8
        assert command.wait() == 0, command.error
    assert command.output.endswith("Stopping the proxy.\n")
    for status, body in refusals:
        assert status == 503
        assert json.loads(body)["error"]["message"] == "the proxy is being stopped"


@pytest.mark.parametrize(
    ("taken", "numbers"), [(64, set()), (32, {"64", "32"})], ids=["by option", "by server"]
)
def test_a_limit_of_samples_that_the_server_lowers_says_so(taken: int, numbers: set[str]) -> None:
    limit = samples_limit(64, taken)
    assert "--concurrency" in limit
    assert ("server" in limit) == (taken < 64)
    assert set(re.findall(r"\d+", limit)) == numbers


def runs(process: psutil.Process) -> bool:
    """Return True if a process has not ended; a zombie has, and waits for its new parent."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_a_killed_proxy_leaves_neither_samples_nor_processes(
    forker: Forker, tmp_path: Path
) -> None:
    def ask(model: str) -> None:
        with suppress(httpx.TransportError):
            body = {"model": model, "messages": LONG}
            httpx.post(f"{base_url}/chat/completions", json=body, timeout=30)

    with serving(answer) as fake, ThreadPoolExecutor(2) as pool:
        command, base_url = start(forker, tmp_path, fake.url)
        asked = [pool.submit(ask, model) for model in ("majority@4", "default")]
        assert eventually(lambda: fake.in_flight == 5, 30)
        workers = psutil.Process(command.pid).children(recursive=True)
        os.kill(command.pid, signal.SIGKILL)
        assert eventually(lambda: fake.in_flight == 0, 5)
        assert len(fake.disconnected) == 5
        assert command.wait() == -signal.SIGKILL
        assert workers
        assert eventually(lambda: not any(map(runs, workers)), 10)
        for question in asked:
            question.result(10)


def test_the_proxy_answers_before_the_frontend_is_imported() -> None:
    program = (
        "import sys, lim_sglang.cli, lim_sglang.programs.proxy.app; "
        "print(sorted({'torch', 'sglang', 'transformers', 'openai', 'fastapi'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--thinking-budget", "9", "--no-thinking"), "limits thoughts that --no-thinking forbids"),
        (("--thinking-budget", "99", "--max-tokens", "99"), "leaves nothing of max_tokens 99"),
        (("--no-thinking",), "no enable_thinking to switch"),
        (("--port", "{port}"), "port {port} of 127.0.0.1 is in use"),
        (("--url", "http://127.0.0.1:9"), "no server answers"),
    ],
)
def test_a_proxy_that_cannot_start_says_why(
    options: tuple[str, ...], words: str, forker: Forker, tmp_path: Path
) -> None:
    with serving(answer, switches_thoughts=False) as fake:
        port = fake.url.rpartition(":")[2]
        given = [option.format(port=port) for option in options]
        code, command = forker.run(tmp_path, "proxy", "--url", fake.url, "--port", "0", *given)
    assert code != 0
    assert words.format(port=port) in " ".join(command.error.split())
    assert "Traceback" not in command.error
