"""`lim proxy` as a command: it starts, answers, and ends without leaving anything behind."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.sglang_server import Chain, endless, eventually, serving
from tests.forked_commands import Forker

QUESTION: list[Any] = [{"role": "user", "content": "What is 17 * 23?"}]
LONG: list[Any] = [{"role": "user", "content": "long"}]


def answer(body: dict[str, Any]) -> Chain:
    """Answer a short question; a long one has no end."""
    return endless("let me") if body["messages"] == LONG else Chain(("so \\boxed{391}",))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_and_ends_at_once_with_all_samples_in_flight(
    number: signal.Signals, forker: Forker, tmp_path: Path
) -> None:
    def ask(stream: bool) -> tuple[int, str]:
        body = {"model": "majority@4", "messages": LONG, "stream": stream}
        reply = httpx.post(f"{base_url}/chat/completions", json=body, timeout=30)
        return reply.status_code, reply.text

    with serving(answer) as fake, ThreadPoolExecutor(2) as pool:
        command = forker.start(tmp_path, "proxy", "--url", fake.url, "--port", "0")
        assert eventually(lambda: "stop      Ctrl-C" in command.output, 60), command.error
        limits = "16 questions and 64 samples of all of them, in at most 112 threads"
        assert f"at once   {limits}" in command.output
        found = re.search(r"base url  (\S+)", command.output)
        assert found
        base_url = found[1]
        chat = openai.OpenAI(base_url=base_url, api_key="none").chat.completions
        vote: Any = chat.create(model="majority@3", messages=QUESTION)
        assert vote.lim["votes"][0]["votes"] == 3
        answers = [pool.submit(ask, stream) for stream in (False, True)]
        assert eventually(lambda: fake.in_flight == 8)
        start_s = time.monotonic()
        command.send(number)
        (refused, body), (ok, events) = (future.result(30) for future in answers)
        assert eventually(lambda: fake.in_flight == 0, 1.0)
        assert time.monotonic() - start_s < 3
        assert len(set(fake.aborted)) == 8
        assert command.wait() == 0, command.error
    assert command.output.endswith("Stopping the proxy.\n")
    assert (ok, refused) == (200, 503)
    assert "the proxy is being stopped" in events
    assert json.loads(body)["error"]["message"] == "the proxy is being stopped"


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
