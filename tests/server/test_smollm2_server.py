"""`./launch.sh` with the embedded model: a real one, whose tokens and sets are the oracle's."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from lim_sglang.models import SMOLLM2, embedded_model
from tests.processes import LAUNCH, LocalServer, disagreements, serving
from tests.server.oracle import Oracle, OracleRun
from tests.server.tiny_model import BUDGET, NUM_NEW, Prompt, stories

pytestmark = pytest.mark.e2e

SELECT_LAYERS = (2, 17)
"""The preset of SmolLM2's shape."""
API_KEY = "a-key-of-the-tests"
SETTINGS = {
    "LIM_API_KEY": API_KEY,
    "SGLANG_USE_CPU_ENGINE": "",  # `lim serve` sets it
}
ENDS_WITHIN_S = 20.0
BLOCK_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the server's log."""
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Return the stories in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model(SMOLLM2))
    return [tokenizer(story)["input_ids"] for story in stories()]


@pytest.fixture(scope="module")
def runs(prompts: list[Prompt]) -> list[OracleRun]:
    """Return the oracle's runs of the stories, on the folder that is served."""
    oracle = Oracle(embedded_model(SMOLLM2), select_layers=SELECT_LAYERS, budget=BUDGET)
    return [oracle.generate(prompt, NUM_NEW) for prompt in prompts]


@pytest.fixture(scope="module")
def server(folder: Path, runs: list[OracleRun]) -> Iterator[LocalServer]:
    """Run `lim serve --budget 256`, started when the oracle has left the cores free."""
    with serving([*LAUNCH, "--budget", str(BUDGET)], folder=folder, settings=SETTINGS) as running:
        yield running


def test_the_ready_block_says_where_what_and_how(server: LocalServer, folder: Path) -> None:
    block = ready_block(folder / "server.log")
    assert server.url in block
    assert SMOLLM2.name in block
    assert f"read {BUDGET} tokens picked at layers 2, 17" in block
    assert "layers    " not in block  # those of this very model
    assert f'lim ask "What is 17 * 23?" --samples 8 --url {server.url}' in block


def ready_block(log: Path) -> str:
    """Return the message of `lim serve` when its server is ready."""
    deadline = time.monotonic() + BLOCK_WITHIN_S
    while "Ctrl-C" not in log.read_text():
        assert time.monotonic() < deadline, f"no block in {BLOCK_WITHIN_S} s"
        time.sleep(0.5)
    return log.read_text().partition("LessIsMore is live")[2].partition("Ctrl-C")[0]


def test_stories_all_at_once_are_the_oracles(
    server: LocalServer, prompts: list[Prompt], runs: list[OracleRun]
) -> None:
    assert not disagreements(server, server.ask_cold(prompts, together=True), runs)


def test_some_stories_one_by_one_are_the_oracles(
    server: LocalServer, prompts: list[Prompt], runs: list[OracleRun]
) -> None:
    some = slice(None, None, 2)  # all of them have been asked together
    answers = server.ask_cold(prompts[some], together=False)
    assert not disagreements(server, answers, runs[some])


def test_a_chat_longer_than_the_budget_has_sparse_rows(server: LocalServer) -> None:
    before = server.lim()["sparse_rows"]
    answer = server.chat(f"{stories()[0]} What was carried?", num_tokens=8)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > BUDGET
    # The first token comes from prefill.
    num_sparse = server.lim()["sparse_rows"] - before
    assert num_sparse >= answer["usage"]["completion_tokens"] - 1 > 0


def test_a_client_without_the_key_is_turned_away(server: LocalServer) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 401


MESSAGES = [{"role": "user", "content": "Is the sky blue?"}]
SCHEMA = {
    "type": "object",
    "properties": {"blue": {"type": "boolean"}},
    "required": ["blue"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "answer", "parameters": SCHEMA}}


def ask(server: LocalServer, path: str, **body: Any) -> httpx.Response:
    """Send a request with the key."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=120)


def ask_chat(server: LocalServer, **body: Any) -> httpx.Response:
    """Send a chat that is answered in a few tokens, greedily."""
    given = {"model": "m", "messages": MESSAGES, "max_tokens": 48, "temperature": 0}
    return ask(server, "/v1/chat/completions", **given, **body)


def json_schema(schema: Any) -> dict[str, Any]:
    """Return the response format of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}


def test_a_chat_in_a_schema_is_served_on_a_cpu(server: LocalServer) -> None:
    for stream in (False, True):
        answer = ask_chat(server, response_format=json_schema(SCHEMA), stream=stream)
        assert answer.status_code == 200, answer.text
    content = ask_chat(server, response_format=json_schema(SCHEMA)).json()["choices"][0]["message"]
    assert json.loads(content["content"]).keys() == {"blue"}


def test_json_and_required_tools_are_served_on_a_cpu(server: LocalServer) -> None:
    answer = ask_chat(server, response_format={"type": "json_object"}).json()
    assert answer["choices"][0]["message"]["content"].lstrip().startswith("{")
    answer = ask_chat(server, tools=[TOOL], tool_choice="required")
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "(yes|no)"},
        {"ebnf": 'root ::= "yes" | "no"'},
        {"json_schema": '{"enum": ["yes", "no"]}'},
    ],
    ids=lambda grammar: next(iter(grammar)),
)
def test_a_grammar_is_served_on_a_cpu(server: LocalServer, grammar: dict[str, str]) -> None:
    sampling = {"max_new_tokens": 8, **grammar}
    native = ask(server, "/generate", text="Yes or no?", sampling_params=sampling)
    assert native.json()["text"].strip('"') in ("yes", "no")
    if "json_schema" not in grammar:
        completion = ask(server, "/v1/completions", model="m", prompt="Yes or no?", **grammar)
        assert completion.json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "grammar",
    [
        {"json_schema": '{"$ref": "#"}'},
        {"json_schema": '{"type": "integer", "const": -9223372036854775808}'},
        {"json_schema": '{"type": "nonsense"}'},
        {"ebnf": "root ::= root"},
        {"regex": "("},
        {"regex": r"[^\s\S]"},
        {"structural_tag": "{}"},
    ],
    ids=str,
)
def test_a_grammar_without_a_match_is_a_400(
    server: LocalServer, grammar: dict[str, str], stream: bool
) -> None:
    sampling = {"max_new_tokens": 8, **grammar}
    answer = ask(server, "/generate", text="a", sampling_params=sampling, stream=stream)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert server.chat("Hello", num_tokens=2)["choices"]


def test_a_grammar_that_gets_stuck_ends_its_request_only(server: LocalServer) -> None:
    sampling = {"max_new_tokens": 64, "regex": "a{1000000000}"}
    answer = ask(server, "/generate", text="a", sampling_params=sampling)
    assert answer.status_code == 200, answer.text
    assert server.chat("Hello", num_tokens=2)["choices"]


def test_sigterm_ends_the_whole_process_tree(server: LocalServer) -> None:
    """Last in this file, because it ends the server."""
    ending = server.end_by(SIGTERM, ENDS_WITHIN_S)
    assert not ending.left
    assert ending.code == 0
