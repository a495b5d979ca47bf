"""`lim proxy` as a process: it starts, answers, and ends without leaving anything behind."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.sglang_server import FakeServer, eventually, serving
from tests.programs.chains import Chain, endless
from tests.programs.forking import Forker
from tests.programs.proxied import QUESTION


def answer(body: dict[str, Any]) -> Chain:
    """An answer to a short question; a long one has none."""
    is_long = body["messages"][0]["content"] == "long"
    return endless("let me") if is_long else Chain(("so \\boxed{391}",))


@contextmanager
def running_proxy(*options: str) -> Iterator[tuple[FakeServer, "subprocess.Popen[str]", str, str]]:
    """A proxy in a process of its own, with its base url and what it said at its start."""
    with serving(answer) as fake:
        command = [sys.executable, "-m", "lim_sglang", "proxy", "--url", fake.url, "--port", "0"]
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout
            said = ""
            while "stop      Ctrl-C" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            found = re.search(r"base url  (\S+)", said)
            assert found
            yield fake, process, found[1], said
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_and_ends_at_once_with_all_that_runs(number: signal.Signals) -> None:
    ends: list[Any] = []

    def ask(base_url: str, stream: bool) -> None:
        body = {"model": "majority@4", "messages": [{"role": "user", "content": "long"}]}
        answer = httpx.post(
            f"{base_url}/chat/completions", json={**body, "stream": stream}, timeout=30
        )
        ends.append((answer.status_code, answer.text))

    with running_proxy() as (fake, process, base_url, said):
        assert (
            "at once   16 questions and 64 samples of all of them, in at most 112 threads" in said
        )
        chat = openai.OpenAI(base_url=base_url, api_key="none").chat.completions
        found: Any = chat.create(model="majority@3", messages=QUESTION)
        assert found.lim["votes"][0]["votes"] == 3
        threads = [threading.Thread(target=ask, args=(base_url, s)) for s in (False, True)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: fake.in_flight == 8)
        start_s = time.monotonic()
        process.send_signal(number)
        for thread in threads:
            thread.join()
        assert eventually(lambda: fake.in_flight == 0, 1.0)
        assert time.monotonic() - start_s < 3
        assert len(set(fake.aborted)) == 8
        # The interpreter takes its time to put torch away.
        assert process.wait(20) == 0
        assert process.stdout
        assert process.stdout.read().strip() == "Stopping the proxy."
    (ok, events), (refused, body) = sorted(ends)
    assert (ok, refused) == (200, 503)
    assert "the proxy is being stopped" in events
    assert json.loads(body)["error"]["message"] == "the proxy is being stopped"


def test_a_port_in_use_and_a_missing_server_are_told_in_words() -> None:
    def run(*options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "lim_sglang", "proxy", *options],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode != 0
        return done.stderr

    with serving(answer) as fake:
        port = fake.url.rpartition(":")[2]
        assert f"port {port} of 127.0.0.1 is in use" in run("--url", fake.url, "--port", port)
    assert "no server answers" in run("--url", "http://127.0.0.1:9", "--port", "0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--thinking-budget", "9", "--no-thinking"), "limits thoughts that --no-thinking forbids"),
        (("--thinking-budget", "99", "--max-tokens", "99"), "leaves nothing of max_tokens 99"),
        (("--no-thinking",), "no enable_thinking to switch"),
    ],
)
def test_thoughts_that_cannot_be_limited_or_switched_are_refused(
    options: tuple[str, ...], words: str, forker: Forker, tmp_path: Path
) -> None:
    with serving(answer, switches_thoughts=False) as fake:
        command = forker.start(tmp_path, "proxy", "--url", fake.url, "--port", "0", *options)
        assert command.wait() == 2
    assert words in " ".join(command.error.split())
    assert "Traceback" not in command.error
