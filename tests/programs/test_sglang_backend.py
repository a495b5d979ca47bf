"""A SGLang server as a backend: connecting, requests, broken streams, thoughts and their budget."""

import io
import json
import re
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from rich.console import Console

from lim_sglang import progress
from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.programs import sglang_backend as sglang_module
from lim_sglang.programs.backend import InFlightSample
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.program import PROGRAMS
from lim_sglang.programs.schema import Access, Api, Sample, SampleState
from lim_sglang.programs.sglang_backend import (
    CLOSING_WORDS,
    SglangBackend,
    check_server,
    close_thoughts,
    connect,
)
from tests.fakes.http import JsonHandler, served
from tests.fakes.sglang_server import (
    CUT,
    Answerer,
    Chain,
    FakeServer,
    Raw,
    Reply,
    completion,
    endless,
    eventually,
    serving,
)
from tests.forked_commands import Forker
from tests.programs.harness import (
    MESSAGES,
    WAIT_S,
    by_sample,
    generate,
    in_thread,
    requests_by_seed,
    run_at,
    run_on,
    states,
)

CONSOLE = Console(quiet=True)
NOBODY = "http://127.0.0.1:9"
"""An address where no server answers."""


def ask(fake: FakeServer, in_flight: InFlightSample | None = None, **access: Any) -> Generation:
    """Generate once, on a backend of its own."""
    with closing(SglangBackend(Access(fake.url, **access))) as backend:
        return generate(backend, in_flight)


def test_a_server_is_not_given_more_requests_than_it_says_it_runs() -> None:
    with serving(lambda _: completion(""), max_running_requests=2) as fake:
        with closing(connect(Access(fake.url), CONSOLE)) as backend:
            assert backend.limiter.total == 2
        with closing(connect(Access(fake.url, max_concurrency=1), CONSOLE)) as backend:
            assert backend.limiter.total == 1


class Other(JsonHandler):
    """No SGLang server: answers all paths alike."""

    def answer(self, body: Any) -> None:
        """Send an empty object, or for an address with /none that there is nothing."""
        self.send_json(404 if self.path.startswith("/none") else 200, {})


@pytest.mark.parametrize("path", ["", "/none"])
@pytest.mark.parametrize(
    ("command", "ending"),
    [
        (None, ""),
        ("lim eval", " `lim eval --api openai` asks other servers of OpenAI's API"),
    ],
)
def test_another_server_is_refused_with_the_command_that_can_ask_it(
    path: str, command: str | None, ending: str
) -> None:
    with served(Other) as url:
        access = Access(f"{url}{path}", command=command)
        for act in (connect, check_server):
            with pytest.raises(ServerError) as refused:
                act(access, CONSOLE)
            assert str(refused.value).endswith(f": is it an SGLang server?{ending}")


@pytest.mark.parametrize("api", Api)
def test_a_server_without_https_is_told_so_by_either_api(api: Api) -> None:
    with served(Other) as url, pytest.raises(ServerError, match=f"in https: try {url}"):
        connect(Access(url.replace("http:", "https:"), api), CONSOLE)


def test_lim_ask_is_named_where_it_meets_another_server(forker: Forker, tmp_path: Path) -> None:
    with served(Other) as url:
        code, command = forker.run(tmp_path, "ask", "2 + 2?", "--url", url)
    assert (code, command.output) == (1, "")
    assert "lim ask --api openai` asks other servers" in command.error


@pytest.mark.parametrize("api", Api)
def test_a_server_that_does_not_answer_is_waited_for_in_words_and_not_longer_than_a_sample(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LATE_S", 0.05)
    shown = io.StringIO()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"did not answer within 1 second"):
            connect(Access(url, api, timeout_s=1.0), Console(file=shown, width=200))
    assert re.search("has not answered yet; waiting 1 s at most\n", shown.getvalue())


def test_a_server_that_answers_at_once_is_not_said_to_be_waited_for() -> None:
    shown = io.StringIO()
    with serving(lambda _: completion("")) as fake:
        connect(Access(fake.url), Console(file=shown)).close()
    assert not shown.getvalue()


def test_connecting_loads_nothing_of_sglang() -> None:
    script = f"""
import sys
from rich.console import Console
from lim_sglang.errors import ServerError
from lim_sglang.programs.schema import Access
from lim_sglang.programs.sglang_backend import connect
try:
    connect(Access("{NOBODY}"), Console())
except ServerError as error:
    print("no server answers" in str(error), "sglang" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout.split() == ["True", "False"], shown.stderr


@pytest.mark.parametrize("thinking", [True, False])
def test_a_switch_for_thoughts_is_refused_if_the_template_has_none(thinking: bool) -> None:
    with serving(lambda _: completion(""), switches_thoughts=False) as fake:
        with pytest.raises(ConfigError, match="has no enable_thinking to switch") as refused:
            connect(Access(fake.url, thinking=thinking), CONSOLE)
        assert not fake.requests
    assert str(refused.value).startswith("--thinking" if thinking else "--no-thinking")


def test_a_thinking_budget_is_refused_of_a_model_that_does_not_think() -> None:
    access = Access(thinking_budget=9)
    answer = completion("")
    with (
        serving(lambda _: answer, switches_thoughts=False, ends_thoughts=False) as fake,
        pytest.raises(ConfigError, match=r"^--thinking-budget: .* the model does not think"),
    ):
        connect(replace(access, url=fake.url), CONSOLE)
    with serving(lambda _: answer, switches_thoughts=False) as fake:  # it always thinks
        connect(replace(access, url=fake.url), CONSOLE).close()
    with serving(lambda _: answer, ends_thoughts=False) as fake:
        connect(replace(access, url=fake.url), CONSOLE).close()


def test_a_switch_for_thoughts_is_sent_if_the_template_has_one() -> None:
    with (
        serving(lambda _: completion("")) as fake,
        closing(connect(Access(fake.url, thinking=False), CONSOLE)) as backend,
    ):
        generate(backend)
    assert fake.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_without_a_switch_the_template_is_not_asked_for() -> None:
    with serving(lambda _: completion(""), tokenizes=False) as fake:
        connect(Access(fake.url), CONSOLE).close()
        assert "/v1/tokenize" not in fake.paths


def test_a_generation_carries_what_the_server_says() -> None:
    in_flight = InFlightSample(0, seed=7)
    with serving(lambda _: completion("so \\boxed{391}", num_tokens=12)) as fake:
        found = ask(fake, in_flight)
    assert (found.text, found.num_tokens, found.truncated) == ("so \\boxed{391}", 12, False)
    assert found.error is None
    assert found.latency_s > 0
    assert in_flight.generation == found
    assert fake.requests == [
        {
            "rid": found.rid,
            "model": "default",
            "messages": MESSAGES,
            "max_tokens": 64,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "seed": 7,
            "separate_reasoning": False,
        }
    ]


@pytest.mark.parametrize("content", [{}, {"choices": []}, [], {"choices": [{"message": None}]}])
def test_an_answer_of_another_form_is_a_failure(content: Any) -> None:
    with serving(lambda _: (200, content)) as fake:
        assert "no chat completion" in str(ask(fake).error)


ERROR = Raw('data: {"error": {"object": "error", "message": "out of memory", "code": 503}}')
MALFORMED = Raw('data: {"choices": [{"delta"')
FOREIGN = Raw('data: {"choices": [{"text": "a completion of the old kind"}]}')
KEEP_ALIVE = Raw(": ping")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (MALFORMED, "the stream is no chat completion"),
        (FOREIGN, "the stream is no chat completion"),
        (ERROR, "the server ended the stream: out of memory"),
        (CUT, "was lost"),
    ],
    ids=["malformed", "foreign", "error", "cut"],
)
def test_a_broken_stream_is_tried_again_and_then_fails_in_words(fault: Raw, words: str) -> None:
    broken = Chain(("so ", "far ", fault, "on"))
    good = Chain(("\\boxed{391}",))
    with serving(by_sample({1: broken}, good)) as fake:
        outcome = run_at(fake, 3, seed=0, streamed=True)
        assert eventually(lambda: fake.in_flight == 0)
    assert states(outcome) == ["finished", "failed", "finished"]
    assert words in str(outcome.samples[1].error)
    assert outcome.samples[1].answer is None
    assert outcome.samples[1].num_tokens == 2
    assert (outcome.vote.votes, outcome.vote.failed) == (2, 1)
    assert requests_by_seed(fake) == {0: 1, 1: 3, 2: 1}
    # The server may still be busy with them.
    assert set(fake.aborted) == {body["rid"] for body in fake.requests if body["seed"] == 1}


@pytest.mark.parametrize("fault", [MALFORMED, ERROR, CUT], ids=["malformed", "error", "cut"])
def test_a_stream_that_breaks_once_is_complete_at_the_next_try(fault: Raw) -> None:
    good = Chain(("\\boxed", "{391}"), confidences=(8.0, 4.0))
    chains = iter([Chain(("lost ", fault), confidences=(0.5,)), good])
    with serving(lambda _: next(chains)) as fake:
        (sample,) = run_at(fake, 1, program=PROGRAMS["confidence"]).samples
    assert (sample.text, sample.num_tokens, sample.error) == ("\\boxed{391}", 2, None)
    assert sample.confidence == pytest.approx(6.0)
    assert sample.tokens_at_least  # the try that broke took some, too


def test_a_stream_may_hold_comments_and_any_character() -> None:
    pieces = ("a\u2028b", KEEP_ALIVE, "\x85", "\\boxed{", "7}")
    with serving(lambda _: Chain(pieces)) as fake:
        (sample,) = run_at(fake, 1, streamed=True).samples
    assert sample.text == "a\u2028b\x85\\boxed{7}"
    assert (sample.answer, sample.num_tokens) == ("7", 4)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_sample_that_never_ends_fails_in_time_and_is_aborted(streamed: bool) -> None:
    good = completion("\\boxed{1}")
    with (
        serving(by_sample({1: endless("on and ", "on ")}, good)) as fake,
        closing(SglangBackend(Access(fake.url, timeout_s=0.5))) as backend,
    ):
        outcome = run_on(backend, 3, seed=0, streamed=streamed)
        assert eventually(lambda: fake.in_flight == 0)
    assert states(outcome) == ["finished", "failed", "finished"]
    failed = outcome.samples[1]
    assert "did not answer within 0.5 seconds: raise --timeout" in str(failed.error)
    assert fake.aborted == [failed.rid]
    assert requests_by_seed(fake)[1] == 1
    assert (failed.num_tokens, failed.answer) == ((2 if streamed else 0), None)
    assert [sample.tokens_at_least for sample in outcome.samples] == [False, True, False]
    assert outcome.spent_at_least


def test_a_server_that_hangs_costs_no_more_than_the_time_outs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang_module, "ABORT_TIMEOUT_S", 0.2)
    with (
        serving(lambda _: endless(), answers_aborts=False) as fake,
        closing(SglangBackend(Access(fake.url, timeout_s=0.3))) as backend,
    ):
        outcome = run_on(backend, 16)
        assert outcome.elapsed_s < 3.0
        assert eventually(lambda: fake.in_flight == 0)
    assert set(states(outcome)) == {"failed"}
    assert outcome.vote.winner is None


TEXT = "<think>\none two three\n</think>\n\nIt is \\boxed{7}."
"""Five words up to the end of the thoughts."""


def take_one(answer: Any, *, tokenizes: bool = True, streamed: bool = False) -> Sample:
    """Return the one sample of a question."""
    with serving(answer, tokenizes=tokenizes) as fake:
        (sample,) = run_at(fake, 1, streamed=streamed).samples
    return sample


def counted_by_the_server(text: str, reasoning: int) -> Reply:
    """Return a completion whose usage counts the thoughts."""
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    usage = {"completion_tokens": 9, "reasoning_tokens": reasoning}
    return 200, {"choices": [choice], "usage": usage}


SHARE = len("<think>\none two three\n</think>") / len(TEXT)


@pytest.mark.parametrize(
    ("reply", "tokenizes", "num_reasoning_tokens", "estimated"),
    [
        (completion(TEXT, num_tokens=9), True, 5, False),
        (completion(TEXT, num_tokens=4), True, 4, False),  # no more than all tokens
        (completion(TEXT, num_tokens=90), False, round(90 * SHARE), True),
        (counted_by_the_server(TEXT, 6), True, 6, False),
    ],
    ids=["tokenizer", "limit", "estimate", "server"],
)
def test_thoughts_of_a_complete_answer_are_counted_by_the_server_or_its_tokenizer(
    reply: Reply | Chain, tokenizes: bool, num_reasoning_tokens: int, estimated: bool
) -> None:
    sample = take_one(lambda _: reply, tokenizes=tokenizes)
    assert sample.num_reasoning_tokens == num_reasoning_tokens
    assert sample.reasoning_estimated == estimated


@pytest.mark.parametrize("text", ["It is 7.", "It is <think>."])
def test_without_thoughts_the_tokenizer_is_not_asked(text: str) -> None:
    with serving(lambda _: completion(text)) as fake:
        (sample,) = run_at(fake, 1).samples
        assert "/v1/tokenize" not in fake.paths
    assert (sample.num_reasoning_tokens, sample.reasoning_estimated) == (0, False)


@pytest.mark.parametrize(
    ("pieces", "streamed"),
    [
        (("<think>", "\n", "hm", "hm"), True),  # they never end
        (("<think>", "\n", "hm", "hm"), False),
        (("<think>", "hm", "</th", "ink>", "\\boxed{", "7}"), True),  # their end is split
    ],
)
def test_thoughts_are_counted_up_to_their_end(pieces: tuple[str, ...], streamed: bool) -> None:
    sample = take_one(lambda _: Chain(pieces), streamed=streamed)
    assert (sample.num_reasoning_tokens, sample.num_tokens) == (4, len(pieces))
    assert not sample.reasoning_estimated


def test_an_aborted_answer_that_is_not_streamed_has_its_thoughts_counted_too() -> None:
    gate = Event()
    chains = {
        0: Chain(("\\boxed{1}",), until=gate),
        1: endless("<think> one", " two </think>", " so", "", ""),
    }

    options = {"wanted": 1}
    with serving(by_sample(chains)) as fake:
        future = in_thread(run_at, fake, 2, program=PROGRAMS["short"], seed=0, options=options)
        assert eventually(lambda: fake.num_tokens == 6)
        gate.set()
        aborted = future.result(WAIT_S).samples[1]
    assert aborted.state is SampleState.ABORTED
    assert (aborted.num_reasoning_tokens, aborted.num_tokens) == (4, 5)


BUDGET, LIMIT = 30, 64
ANSWER = "It is \\boxed{391}."


def thinking(first: str, second: Reply | Chain | None = None) -> Answerer:
    """Answer with thoughts that use up the budget, then with the second reply."""

    def answer(body: dict[str, Any]) -> Reply | Chain:
        if body.get("continue_final_message"):
            return second or completion(ANSWER, num_tokens=7)
        return completion(first, num_tokens=body["max_tokens"], reason="length")

    return answer


@pytest.mark.parametrize(
    ("reason", "budget", "asked"), [("stop", BUDGET, BUDGET), ("length", 500, LIMIT)]
)
def test_thoughts_that_end_in_time_or_have_more_than_the_limit_take_one_request(
    reason: str, budget: int, asked: int
) -> None:
    with serving(lambda _: completion("<think>\nhm", num_tokens=12, reason=reason)) as fake:
        found = ask(fake, thinking_budget=budget)
    assert [request["max_tokens"] for request in fake.requests] == [asked]
    assert (found.num_tokens, found.truncated) == (12, reason == "length")


@pytest.mark.parametrize("streamed", [False, True])
def test_longer_thoughts_are_closed_and_the_model_answers(streamed: bool) -> None:
    in_flight = InFlightSample(0, streamed=streamed)
    with serving(thinking("<think>\nhm hm")) as fake:
        found = ask(fake, in_flight, thinking_budget=BUDGET)
    first, second = fake.requests
    beginning = f"<think>\nhm hm{CLOSING_WORDS}"
    assert (first["max_tokens"], second["max_tokens"]) == (BUDGET, LIMIT - BUDGET)
    assert second["messages"] == [*MESSAGES, {"role": "assistant", "content": beginning}]
    assert found.text == beginning + ANSWER
    assert (found.num_tokens, found.num_reasoning_tokens) == (BUDGET + 7, BUDGET)
    assert (found.truncated, found.error, found.rid) == (False, None, second["rid"])
    assert in_flight.num_tokens >= BUDGET
    assert in_flight.text == (found.text if streamed else beginning)
    assert in_flight.generation == found


def test_an_answer_that_has_begun_is_continued_as_it_was() -> None:
    beginning = "<think>\nhm\n</think>\n\nIt is "
    with serving(thinking(beginning)) as fake:
        assert ask(fake, thinking_budget=BUDGET).text == beginning + ANSWER


@pytest.mark.parametrize(
    ("second", "truncated", "error", "num_tokens"),
    [
        (completion("It", num_tokens=LIMIT - BUDGET, reason="length"), True, "None", LIMIT),
        ((400, {"detail": "too long"}), False, "HTTP 400: too long", BUDGET),
    ],
)
def test_tokens_of_the_thoughts_count_if_the_answer_is_cut_off_or_fails(
    second: Reply | Chain, truncated: bool, error: str, num_tokens: int
) -> None:
    with serving(thinking("<think>\nhm", second)) as fake:
        found = ask(fake, thinking_budget=BUDGET)
    assert (found.truncated, found.num_tokens) == (truncated, num_tokens)
    assert error in str(found.error)


def test_no_second_request_follows_a_cancel() -> None:
    in_flight = InFlightSample(0)

    def answer(body: dict[str, Any]) -> Chain:
        in_flight.cancel()
        return completion("<think>\nhm", num_tokens=BUDGET, reason="length")

    with serving(answer) as fake:
        found = ask(fake, in_flight, thinking_budget=BUDGET)
    assert found.aborted
    assert len(fake.requests) == 1


def test_half_a_character_is_not_repeated() -> None:
    assert close_thoughts("<think>\nπ is\ufffd") == f"<think>\nπ is{CLOSING_WORDS}"


@pytest.mark.parametrize("drafts", [False, True])
def test_drafts_of_the_question_are_recorded_and_shown(
    drafts: bool, forker: Forker, tmp_path: Path
) -> None:
    with serving(lambda _: completion("\\boxed{391}"), drafts=drafts) as fake:
        words = ("ask", "What is 17 * 23?", "--url", fake.url, "--samples", "2")
        code, shown = forker.run(tmp_path, *words)
        _, recorded = forker.run(tmp_path, *words, "--json")
    counts = {"cycles": 10, "drafted_tokens": 80, "accepted_tokens": 60}
    counts |= {"accepted_histogram": {"6": 10}, "cycles_by_width": {"9": 10}}
    counts |= {"rows_capped": {}, "cycles_undrafted": {}}
    assert code == 0, shown.error
    line = "drafts: 60 of 80 accepted, 7.0 tokens a request and cycle"
    assert (line in shown.error) == drafts
    assert json.loads(recorded.output)["drafts"] == (counts if drafts else None)
