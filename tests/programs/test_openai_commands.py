"""`lim ask` and `lim eval` with a server of OpenAI's API, as processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.openai_server import Streamed, serving_openai

ANSWER = Streamed(("It is ", "\\boxed{3}."), num_tokens=9)
WAIT_S = 120.0


def lim(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end, with no setting from outside."""
    names = ("LIM_URL", "LIM_API_KEY", "OPENAI_API_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-m", "lim_sglang", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def test_a_vote_and_its_record() -> None:
    with serving_openai(lambda _: ANSWER, key="k") as fake:
        done = lim(
            *("ask", "What is 1 + 2?", "--samples", "3", "--json", "--temperature", "0.8"),
            *("--api", "openai", "--base-url", f"{fake.url}/v1", "--api-key", "k"),
        )
    assert done.returncode == 0, done.stderr
    assert "small by OpenAI's API, which has no top_k" in done.stderr
    record = json.loads(done.stdout)
    assert (record["answer"], record["tokens_spent"]) == ("3", 27)
    assert record["server"]["api"] == "openai"
    sampling = {name: record["sampling"][name] for name in ("temperature", "top_p", "top_k")}
    assert sampling == {"temperature": 0.8, "top_p": 0.95, "top_k": -1}
    assert not any(sample["seed_honoured"] for sample in record["samples"])
    assert {(r["temperature"], r["top_p"]) for r in fake.requests} == {(0.8, 0.95)}
    assert not any("top_k" in request for request in fake.requests)


def test_an_evaluation_says_which_api_it_used(tmp_path: Path) -> None:
    row = {"problem": "What is 1 + 2?", "answer": "3"}
    (tmp_path / "math500.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "run"
    with serving_openai(lambda _: ANSWER) as fake:
        done = lim(
            *("eval", "math500", "--data-dir", str(tmp_path), "--out", str(out), "--samples", "2"),
            *("--api", "openai", "--url", fake.url, "--model", "small", "--top-k", "40"),
        )
    assert done.returncode == 0, done.stderr
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert (settings["api"], settings["server"]["model_path"]) == ("openai", "small")
    assert (settings["sampling"]["temperature"], settings["sampling"]["top_k"]) == (0.6, 40)
    assert {request["top_k"] for request in fake.requests} == {40}
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--api", "grpc"), "'grpc'"),
        (("--model", "small"), "--model goes with --api openai"),
        (("--api", "openai", "--thinking-budget", "9"), "--thinking-budget needs --api sglang"),
        (("--thinking-budget", "2048"), "leaves nothing of max_tokens 2,048 to answer"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: tuple[str, ...], words: str) -> None:
    done = lim("ask", "What is 1 + 2?", *arguments)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
