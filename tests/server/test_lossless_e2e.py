"""Policy lossless on a real CPU server: the dense server's tokens, by the oracle's cycles."""

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lim_sglang.attention_backend import SECOND_READING
from lim_sglang.compat import resolve
from lim_sglang.models import SMOLLM2, embedded_model
from tests.processes import (
    CHECKS,
    ON_CPU,
    SGLANG,
    LocalServer,
    serving,
    set_differences,
    token_differences,
)
from tests.server import interpreted_passes, planted
from tests.server.draft_oracle import DraftOracle
from tests.server.tiny_model import SELECT_LAYERS, long_prompts, random_prompt

pytestmark = pytest.mark.e2e

BUDGET, NUM_DRAFTS = 64, 8
NUM_REQUESTS, NUM_IN_CROWD, AT_ONCE = 60, 200, 12
NUM_NEW = 48
LENGTHS = (5, 40, 62, 63, 64, 65, 120, 300, 700)
"""Tokens of the prompts, on both sides of the budget."""
EOS = 2
MAX_DIFFERENCE = 1e-4
"""Of two logprobs, by the rounding of a batch."""
CAPPED = {"penalty", "logit_processor", "hidden_states"}
"""Reasons for runs of one token that requests of every model have."""
DENSE = ("--lim-policy", "full", "--sampling-backend", "lim")


def lossless(layers: Sequence[int]) -> tuple[str, ...]:
    """Return the options of a server that drafts with lists of these layers."""
    lists = ",".join(map(str, layers))
    policy = ("--lim-policy", "lossless", "--lim-budget", str(BUDGET))
    return (*policy, "--lim-select-layers", lists)


LOSSLESS = lossless(SELECT_LAYERS)


@cache
def without_tokens() -> str:
    """Return SGLang's processor that keeps some tokens from being drawn, as requests name it."""
    name = "sglang.srt.sampling.custom_logit_processor.DisallowedTokensLogitsProcessor"
    processor: Any = resolve(name)
    return str(processor.to_str())


def request(number: int) -> dict[str, Any]:
    """Return one of many requests that differ in all that decides about tokens."""
    rng = random.Random(number)
    sampling: dict[str, Any] = {"max_new_tokens": rng.randrange(8, 64), "temperature": 0}
    if number % 4:
        sampling |= {"temperature": rng.choice([0.6, 1.0]), "sampling_seed": number}
        sampling |= rng.choice([{"top_p": 0.95}, {"top_k": 20}, {"min_p": 0.05}, {}])
    by_number = {
        5: {"min_new_tokens": 7},
        6: {"ignore_eos": True},
        7: {"frequency_penalty": 0.5},
        14: {"presence_penalty": 0.5, "repetition_penalty": 1.2},
        17: {"repetition_penalty": 1.2},
        9: {"logit_bias": {str(EOS): 6.0}},  # ends early, within runs
        10: {"stop": [*(f"w{n}" for n in range(5, 40)), " the", ","]},
        11: {"stop_token_ids": list(range(40, 80))},
        19: {"custom_params": {"token_ids": list(range(5, 60))}},
        21: {"frequency_penalty": 0.5, "logit_bias": {str(EOS): 4.0}},
    }
    for every, more in by_number.items():
        if number % every == 0:
            sampling |= more
    prompt = random_prompt(rng.choice(LENGTHS), number)
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": number % 3 == 0}
    if number % 12 == 0:
        body["token_ids_logprob"] = [5, 6]
    if number % 19 == 0:
        body["custom_logit_processor"] = without_tokens()
    if number % 23 == 0:
        body["return_hidden_states"] = True
    return body | {"top_logprobs_num": 2 * (number % 3 == 0)}


@dataclass(frozen=True)
class Outcome:
    """All that a user sees of an answer."""

    tokens: tuple[int, ...]
    text: str
    finish: dict[str, Any]
    logprobs: tuple[float, ...]

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> "Outcome":
        """Read an answer of `/generate`."""
        meta = result["meta_info"]
        logprobs = [pair[0] for pair in meta.get("output_token_logprobs", ())]
        tops = meta.get("output_top_logprobs", ())
        assert all(len(each) == 2 for each in tops)
        assert len(tops) == len(logprobs)
        return cls(
            tuple(result["output_ids"]), result["text"], meta["finish_reason"], tuple(logprobs)
        )


def ask(server: LocalServer, body: Mapping[str, Any]) -> Any:
    """Return the server's answer to one body."""
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300)
    assert answer.is_success, answer.text
    return answer.json()


def ask_all(
    server: LocalServer, count: int = NUM_REQUESTS, *, with_grammar: bool = False
) -> list[Outcome]:
    """Ask many requests, several at once, and abort others among them; some by a grammar, if the
    model has a tokenizer that grammars can read."""

    def one(number: int) -> Outcome:
        if number % 8 == 3:  # ends in mid-stream
            aborted = request(number + 1000) | {"stream": True}
            aborted["sampling_params"] |= {"max_new_tokens": 64, "ignore_eos": True}
            url = f"{server.url}/generate"
            with httpx.stream("POST", url, json=aborted, timeout=300) as stream:
                next(stream.iter_lines())
        body = request(number)
        if with_grammar and number % 13 == 0:
            body["sampling_params"]["regex"] = "[ a-zA-Z,.]{30,}"
        return Outcome.from_result(ask(server, body))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, range(count)))


def ask_samples(server: LocalServer) -> list[tuple[int, ...]]:
    """Return three samples of one prompt with one seed."""
    sampling = {"n": 3, "temperature": 1.0, "sampling_seed": 5, "max_new_tokens": NUM_NEW}
    body = {"input_ids": random_prompt(200, 1), "sampling_params": sampling}
    return [tuple(each["output_ids"]) for each in ask(server, body)]


Filling = list[tuple[int, ...]]
"""Tokens of the requests that fill the context."""


def fill_context(server: LocalServer) -> Filling:
    """Return the tokens of two neighbours of which each fills the whole context."""
    prompts = [random_prompt(length, 2) for length in (4070, 4071)]
    answers = server.ask_together(prompts, num_tokens=24)
    return [answer.tokens for answer in answers]


@dataclass(frozen=True)
class Dense:
    """What the dense server answers; it has ended."""

    outcomes: list[Outcome]
    samples: list[tuple[int, ...]]


def command(model: Path, *options: str) -> list[str]:
    """Return the command of a server."""
    start = [*SGLANG, "--model-path", str(model), *ON_CPU]
    allowed = ("--enable-custom-logit-processor", "--enable-return-hidden-states")
    return [*start, *allowed, "--attention-backend", "lim", *options]


@pytest.fixture(scope="module")
def dense_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Ask the dense server everything."""
    folder = tmp_path_factory.mktemp("dense")
    with serving(command(tiny_model, *DENSE), folder=folder) as server:
        return Dense(ask_all(server), ask_samples(server))


@pytest.fixture(scope="module")
def filling(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Filling:
    """Fill the dense server's context."""
    folder = tmp_path_factory.mktemp("filling")
    with serving(command(tiny_model, *DENSE), folder=folder) as server:
        return fill_context(server)


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, dense_server: Dense, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """Serve by drafts, with SGLang's checks on."""
    drafts = ("--lim-draft-tokens", str(NUM_DRAFTS))
    folder = tmp_path_factory.mktemp("lossless")
    with serving(
        command(tiny_model, *LOSSLESS, *drafts), folder=folder, settings=CHECKS
    ) as running:
        yield running


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> DraftOracle:
    """The tiny model by drafts of the server's length."""
    shape = {"select_layers": SELECT_LAYERS, "budget": BUDGET, "num_drafts": NUM_DRAFTS}
    return DraftOracle(tiny_model, **shape)


def differences(found: list[Outcome], expected: list[Outcome]) -> list[str]:
    """Return a line for each answer that is not the dense server's."""
    lines = []
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if (one.tokens, one.text, one.finish) != (other.tokens, other.text, other.finish):
            lines.append(f"{number}: {one} instead of {other}")
        elif not all(
            math.isclose(a, b, abs_tol=MAX_DIFFERENCE)
            for a, b in zip(one.logprobs, other.logprobs, strict=True)
        ):
            lines.append(f"{number}: other logprobs")
    return lines


def drafting(server: LocalServer) -> dict[str, Any]:
    """Return the server's counters."""
    state = server.lim()
    assert state is not None
    return state


def wrong_answers(server: LocalServer, dense: Dense) -> list[str]:
    """Return a line for each answer and sample that is not the dense server's."""
    lines = differences(ask_all(server), dense.outcomes)
    return lines if ask_samples(server) == dense.samples else [*lines, "other samples"]


def wrong_cycles(server: LocalServer, oracle: DraftOracle) -> list[str]:
    """Return a line for each list and count of accepted drafts that is not the oracle's."""
    lines = []
    # Two at once, which may be mistaken for one another, again with their prompts in the radix
    # tree, and two that grow past the budget, where the list decides what is accepted.
    pair = long_prompts()[:2]
    for prompts in (pair, pair, [random_prompt(62, number) for number in (3, 4)]):
        before = drafting(server)["accepted_histogram"]
        answers = server.ask_together(prompts, NUM_NEW)
        after = drafting(server)["accepted_histogram"]
        runs = [oracle.generate(prompt, NUM_NEW) for prompt in prompts]
        for answer, run in zip(answers, runs, strict=True):
            lines += token_differences(answer.tokens, run.tokens)
            lines += set_differences(server.kept_sets(answer), run.sets)
        found = Counter({int(each): count - before.get(each, 0) for each, count in after.items()})
        expected = sum((run.accepted for run in runs), Counter[int]())
        if +found != expected:
            fewer = "fewer " * (found.total() > 0 and _mean(found) < _mean(expected))
            lines.append(f"{fewer}accepted: {+found}, expected {expected}")
    return lines


def _mean(histogram: Counter[int]) -> float:
    """Return the mean of numbers that a histogram counts."""
    return sum(number * count for number, count in histogram.items()) / histogram.total()


def wrong_keys(server: LocalServer) -> list[str]:
    """Return a line where a later turn, which shares keys, differs from an empty cache's."""
    first = random_prompt(150, 7)
    turn = [*first, *server.ask(first, NUM_NEW).tokens, *random_prompt(20, 8)]
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": turn, "sampling_params": sampling, "return_logprob": True}
    body["top_logprobs_num"] = 2
    shared = ask(server, body)
    httpx.post(f"{server.url}/flush_cache?timeout=20", timeout=60).raise_for_status()
    alone = ask(server, body)
    assert shared["meta_info"]["cached_tokens"] >= len(first) + NUM_NEW - 1
    return differences([Outcome.from_result(shared)], [Outcome.from_result(alone)])


def test_every_answer_is_the_dense_servers(server: LocalServer, dense_server: Dense) -> None:
    before = drafting(server)
    assert wrong_answers(server, dense_server) == []
    assert {each.finish["type"] for each in dense_server.outcomes} == {"length", "stop"}
    assert len(set(dense_server.samples)) == 3
    state = drafting(server)
    assert state["accepted_tokens"] - before["accepted_tokens"] > NUM_REQUESTS
    assert set(state["rows_capped"]) == CAPPED
    assert {"1", str(NUM_DRAFTS + 1)} == set(state["cycles_by_width"])


@pytest.mark.slow
def test_a_pool_too_small_changes_no_answer(
    tiny_model: Path, dense_server: Dense, tmp_path: Path
) -> None:
    """Requests are retracted, and go on from a prefill of their prompt and answer."""
    drafts = ("--lim-draft-tokens", str(NUM_DRAFTS))
    start = command(tiny_model, *LOSSLESS, *drafts, *planted.SMALL_POOL)
    with serving(start, folder=tmp_path, settings=CHECKS) as server:
        assert wrong_answers(server, dense_server) == []
        assert drafting(server)["retractions"] > 2


def test_cycles_read_and_accept_what_the_oracle_does(
    server: LocalServer, oracle: DraftOracle
) -> None:
    assert wrong_cycles(server, oracle) == []


def test_a_later_turn_reads_the_keys_that_a_prefill_would_have_left(server: LocalServer) -> None:
    assert wrong_keys(server) == []


@dataclass(frozen=True)
class Crowd:
    """Many requests to one model, answered by the dense server."""

    model: Path
    layers: tuple[int, ...]
    has_grammar: bool
    answers: list[Outcome]


@pytest.fixture(scope="module", params=["tiny", SMOLLM2.name])
def crowd(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Crowd:
    """Ask the dense server of a model."""
    is_tiny = request.param == "tiny"
    model, layers = (tiny_model, SELECT_LAYERS) if is_tiny else (embedded_model(SMOLLM2), (2, 17))
    folder = tmp_path_factory.mktemp("crowd")
    with serving(command(model, *DENSE), folder=folder) as server:
        answers = ask_all(server, NUM_IN_CROWD, with_grammar=not is_tiny)
    return Crowd(model, layers, not is_tiny, answers)


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [1, 4, 8])
def test_a_crowd_of_any_model_gets_the_dense_servers_answers(
    crowd: Crowd, num_drafts: int, tmp_path: Path
) -> None:
    options = [*lossless(crowd.layers), "--lim-draft-tokens", str(num_drafts)]
    with serving(command(crowd.model, *options), folder=tmp_path, settings=CHECKS) as server:
        found = ask_all(server, NUM_IN_CROWD, with_grammar=crowd.has_grammar)
        state = drafting(server)
    sys.stdout.write(f"{num_drafts} drafts: {state}\n")  # shown with -rP
    assert differences(found, crowd.answers) == []
    assert state["accepted_tokens"] > NUM_IN_CROWD
    assert set(state["rows_capped"]) == CAPPED | ({"grammar"} if crowd.has_grammar else set())
    assert str(num_drafts + 1) in state["cycles_by_width"]


@pytest.mark.slow
def test_the_passes_of_a_gpu_give_the_dense_servers_answers(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Interpreted, so that few short requests take a minute."""
    bodies = [request(number) for number in (1, 2, 3, 4, 5, 7)]  # on both sides of the budget
    for number, body in enumerate(bodies):
        body["input_ids"] = body["input_ids"][: BUDGET + 3 * number]
        body["sampling_params"]["max_new_tokens"] = 9

    def answers(server: LocalServer) -> list[Outcome]:
        with ThreadPoolExecutor(len(bodies)) as pool:
            return [Outcome.from_result(found) for found in pool.map(partial(ask, server), bodies)]

    (tmp_path / "dense").mkdir()
    with serving(command(tiny_model, *DENSE), folder=tmp_path / "dense") as server:
        expected = answers(server)
    options = (*LOSSLESS, "--lim-draft-tokens", "3", "--disable-cuda-graph")
    settings = planted.sitecustomize(tmp_path, interpreted_passes.NAME)
    settings |= interpreted_passes.SETTINGS | CHECKS
    with serving(command(tiny_model, *options), folder=tmp_path, settings=settings) as server:
        assert differences(answers(server), expected) == []
        state = drafting(server)
    assert state["score_source"] == SECOND_READING
    assert {"1", "4"} == set(state["cycles_by_width"])
    assert state["accepted_tokens"] > 0


@pytest.mark.slow
def test_requests_may_fill_the_whole_context(server: LocalServer, filling: Filling) -> None:
    """The last cycles draft beyond it, into slots of the request's own."""
    assert fill_context(server) == filling


Checks = Mapping[str, Callable[[LocalServer], list[str]]]
"""Functions, by name, that return a line for each fault of a server."""


@pytest.fixture(scope="module")
def checks(dense_server: Dense, oracle: DraftOracle, filling: Filling) -> Checks:
    """All that a server with a change planted is put to."""
    return {
        "answers": lambda server: wrong_answers(server, dense_server),
        "cycles": lambda server: wrong_cycles(server, oracle),
        "keys": wrong_keys,
        "context": lambda server: [] if fill_context(server) == filling else ["other tokens"],
    }


def faults(
    name: str, checks: Checks, model: Path, folder: Path, options: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Return what each check finds in a server with a change planted; those that find nothing are
    left out. A server that does not come up, or that its own checks end, is a fault by the name of
    `start` or `death`.
    """
    found: dict[str, list[str]] = {}
    drafts = ("--lim-draft-tokens", str(NUM_DRAFTS))
    settings = planted.sitecustomize(folder, name)
    start = command(model, *LOSSLESS, *drafts, *options)
    try:
        with serving(start, folder=folder, settings=settings) as server:
            for check, run in checks.items():
                try:
                    lines = run(server)
                except (AssertionError, httpx.HTTPError) as error:
                    if not server.is_alive():
                        return found | {"death": [str(error)]}
                    lines = [str(error)]
                if lines:
                    found[check] = lines
    except AssertionError as error:
        found["start"] = [str(error)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", planted.DEFECTS)
def test_a_planted_defect_is_caught(
    name: str, checks: Checks, tiny_model: Path, tmp_path: Path
) -> None:
    defect = planted.DEFECTS[name]
    found = faults(name, checks, tiny_model, tmp_path, defect.options)
    for check, lines in found.items():
        sys.stdout.write(f"{name}: {check}: {lines[0][:300]}\n")  # shown with -rP
    assert set(defect.caught_by) <= set(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", planted.WRONG_SETS)
def test_a_wrong_set_costs_acceptance_and_changes_no_token(
    name: str, checks: Checks, tiny_model: Path, tmp_path: Path
) -> None:
    found = faults(name, checks, tiny_model, tmp_path)
    sys.stdout.write("\n".join([f"{name}: {', '.join(found)}", *found.get("cycles", ())]))
    assert set(found) == {"cycles"}
    assert any(line.startswith("fewer accepted") for line in found["cycles"])
    assert not any(line.startswith("tokens") for line in found["cycles"])


@pytest.mark.slow
def test_committed_keys_are_a_prefills(tiny_model: Path, tmp_path: Path) -> None:
    """Keys and values that verification has left in the radix tree, beside those of a prefill of
    the same tokens in an empty cache.
    """
    saved = tmp_path / "keys"
    saved.mkdir()
    settings = planted.sitecustomize(tmp_path, planted.SAVED_KEYS) | CHECKS
    settings[planted.KEYS_VAR] = str(saved)
    start = command(tiny_model, *LOSSLESS, "--lim-draft-tokens", str(NUM_DRAFTS))
    with serving(start, folder=tmp_path, settings=settings) as server:
        prompts = [random_prompt(length, length) for length in (30, 62, 150, 700)]
        server.ask_together(prompts, 40)
        # The newest token has keys only where its run was longer than the answer.
        drafted = {file.name: torch.load(file) for file in saved.iterdir()}
        drafted = {name: each for name, each in drafted.items() if len(each["tokens"]) > 30 + 38}
        assert drafting(server)["accepted_tokens"] > 4 * 10
        for file in saved.iterdir():
            file.unlink()
        httpx.post(f"{server.url}/flush_cache?timeout=20", timeout=60).raise_for_status()
        server.ask_together([each["tokens"] for each in drafted.values()], 1)
    assert len(drafted) == len(prompts)
    for name, found in drafted.items():
        expected = torch.load(saved / name)
        assert expected["tokens"] == found["tokens"]
        for part in ("keys", "values"):
            torch.testing.assert_close(found[part], expected[part], rtol=1e-5, atol=1e-5)
