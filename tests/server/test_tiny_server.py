"""A real server on the tiny model: its tokens and sets are the oracle's, whatever else happens."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lim_sglang.bench import driver, profiled
from lim_sglang.bench.load import Load
from lim_sglang.bench.progress import Progress
from lim_sglang.bench.serve import empty, measure_load
from lim_sglang.bench.serve_facts import vocabulary
from lim_sglang.bench.streams import HEAD_START
from lim_sglang.bench.timeline import recorded_steps
from lim_sglang.errors import DataError
from lim_sglang.programs.http_client import Client as BenchClient
from tests.conftest import DenseTokens
from tests.processes import LocalServer
from tests.server.client import Answer, Client, new_rid
from tests.server.comparing import disagreements
from tests.server.oracle import OracleRun
from tests.server.prompts import (
    BUDGET,
    NUM_NEW,
    Prompt,
    crossing_prompts,
    long_prompts,
    short_prompts,
)
from tests.server.tiny_models import NUM_LAYERS, SELECT_LAYERS

pytestmark = pytest.mark.e2e

Run = Callable[[Prompt], OracleRun]

COUNTERS = ("dense_rows", "sparse_rows", "tokens_kept", "tokens_seen", "retractions")
SAMPLES = 3
ENDS_WITHIN_S = 20.0
SILENT = Progress(lambda _text: None, lambda _text: None, lambda _share, _text: None)


@pytest.fixture
def server(tiny_server: LocalServer) -> LocalServer:
    """The server of this file and of `test_sampler_e2e.py`."""
    return tiny_server


def counters(server: Client) -> dict[str, int]:
    """The counters of rows, and `decode_steps`."""
    state = server.lim()
    assert state is not None
    return {name: state[name] for name in ("decode_steps", *COUNTERS)}


def counted_rows(prompts: Sequence[Prompt]) -> dict[str, int]:
    """What the counters of rows have to grow by when these prompts are answered.

    Prefill gives the first token, and the last one is decoded in vain: SGLang's overlapped
    scheduler learns one step late that a request has ended.
    """
    lengths = [len(p) + number for p in prompts for number in range(1, NUM_NEW + 1)]
    return {
        "dense_rows": sum(length <= BUDGET for length in lengths),
        "sparse_rows": sum(length > BUDGET for length in lengths),
        "tokens_kept": sum(min(length, BUDGET) for length in lengths),
        "tokens_seen": sum(lengths),
        "retractions": 0,
    }


def test_it_shows_its_schedule(server: LocalServer) -> None:
    state = server.lim()
    assert state is not None
    assert state["config"]["budget"] == BUDGET
    assert len(state["roles"]) == NUM_LAYERS
    selecting = [layer for layer, role in enumerate(state["roles"]) if role == "select"]
    assert tuple(selecting) == SELECT_LAYERS


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "all at once"])
@pytest.mark.parametrize("prompts", [long_prompts(), crossing_prompts()], ids=["long", "crossing"])
def test_tokens_and_sets_are_the_oracles(
    server: LocalServer, tiny_run: Run, prompts: list[Prompt], together: bool
) -> None:
    answers = server.ask_cold(prompts, together=together)
    assert max(answer.cached_tokens for answer in answers) <= 1  # two begin with the same word
    assert not disagreements(server, answers, [tiny_run(prompt) for prompt in prompts])


def test_requests_within_the_budget_get_sglangs_own_dense_tokens(
    server: LocalServer, dense_tokens: DenseTokens
) -> None:
    answers = server.ask_cold(short_prompts(), together=False)
    expected = [dense_tokens[tuple(prompt)] for prompt in short_prompts()]
    assert [answer.tokens for answer in answers] == expected
    assert not [answer for answer in answers if server.kept_sets(answer)]


def test_each_long_prompt_tells_this_server_from_a_dense_one(
    tiny_run: Run, dense_tokens: DenseTokens
) -> None:
    same = [p for p in long_prompts() if dense_tokens[tuple(p)] == tiny_run(p).tokens]
    assert not same


def test_a_batch_of_mixed_lengths_gives_each_request_what_it_gets_alone(
    server: LocalServer,
) -> None:
    # Neighbours differ: a dense row, one that crosses the budget, a sparse one, and so on.
    groups = zip(short_prompts(), crossing_prompts(), long_prompts(), strict=False)
    prompts = [prompt for group in groups for prompt in group]
    alone = server.ask_cold(prompts, together=False)
    mixed = server.ask_cold(prompts, together=True)
    assert [answer.tokens for answer in mixed] == [answer.tokens for answer in alone]
    assert list(map(server.kept_sets, mixed)) == list(map(server.kept_sets, alone))


def test_a_prompt_asked_again_comes_from_the_cache_and_changes_nothing(
    server: LocalServer, tiny_run: Run
) -> None:
    prompt = long_prompts()[0]
    server.ask_cold([prompt], together=False)
    again = server.ask(prompt)
    assert again.cached_tokens == len(prompt) - 1  # its last token is computed for the logits
    assert not disagreements(server, [again], [tiny_run(prompt)])


def test_a_prompt_that_goes_on_from_a_cached_one_changes_nothing(
    server: LocalServer, tiny_run: Run
) -> None:
    prompt = long_prompts()[-1]
    start = prompt[: len(prompt) // 2]
    server.ask_cold([start], together=False)
    whole = server.ask(prompt)
    assert whole.cached_tokens == len(start)
    assert not disagreements(server, [whole], [tiny_run(prompt)])


def test_an_abort_in_mid_stream_leaves_the_neighbours_alone(
    server: LocalServer, tiny_run: Run
) -> None:
    prompt, *others = long_prompts()[:4]
    rid, rids = new_rid(), [new_rid() for _ in others]
    aborted = server.stream(prompt, rid, 20 * NUM_NEW)
    streams = [
        server.stream(other, other_rid, NUM_NEW)
        for other, other_rid in zip(others, rids, strict=True)
    ]
    for stream in (aborted, *streams):
        next(stream)  # the first tokens: from here on they run side by side
    server.abort(rid)
    answers = [last(stream) for stream in streams]
    end = last(aborted)

    assert end.finish == "abort"
    assert end.tokens[:NUM_NEW] == tiny_run(prompt).tokens[: len(end.tokens)]
    assert not disagreements(server, answers, [tiny_run(other) for other in others])
    assert max(server.steps(rid)) < max(server.steps(rids[-1])), "the abort came too late"


def last(stream: Iterator[Answer]) -> Answer:
    """The final state of a streamed answer."""
    *_, final = stream
    return final


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "all at once"])
def test_counters_are_exact(server: LocalServer, together: bool) -> None:
    prompts = [*long_prompts()[:3], *crossing_prompts(), *short_prompts()]
    before = counters(server)
    server.ask_cold(prompts, together=together)
    grown = {name: after - before[name] for name, after in counters(server).items()}
    steps = grown.pop("decode_steps")
    assert grown == counted_rows(prompts)
    if together:  # requests that arrive while others are prefilled join them
        assert NUM_NEW <= steps < 2 * NUM_NEW
    else:
        assert steps == len(prompts) * NUM_NEW


def test_each_of_several_samples_of_one_request_is_the_oracles(
    server: LocalServer, tiny_run: Run
) -> None:
    prompt = long_prompts()[0]
    answers = server.ask_copies(prompt, SAMPLES)
    assert not disagreements(server, answers, [tiny_run(prompt)] * SAMPLES)


def test_the_serve_bench_counts_what_the_server_streams(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "POLL_S", 0.02)  # the whole run may take half a second
    load = Load(concurrency=3, prompt_tokens=BUDGET + 50, new_tokens=100)
    with BenchClient(server.url) as client:
        row, _, facts = measure_load(client, load, [], SILENT)
    assert (row.policy, row.concurrency, row.cut, row.retractions) == ("lim", 3, False, 0)
    # All tokens but the first of each stream, and those that came while others were prefilled.
    assert 3 * 99 - 2 * HEAD_START < row.num_tokens <= 3 * 99
    assert row.sparse_rows == 3 * 100  # SGLang runs one step more for a request that has ended
    assert row.tokens_per_s == pytest.approx(row.num_tokens / row.seconds)
    # Three streams side by side: a token of each a step.
    assert 0.2 < row.itl_ms.p50 * row.tokens_per_s / 1e3 / 3 < 2
    assert row.itl_ms.p50 <= row.itl_ms.p99 < 1e3 * row.seconds
    assert row.kv_share is not None
    assert 3 * BUDGET / 16384 < row.kv_share < 0.2
    assert facts["kv_capacity"] == 16384
    assert facts["lim_config"]["budget"] == BUDGET


def test_the_serve_bench_leaves_nothing_running_where_it_is_cut(server: LocalServer) -> None:
    load = Load(concurrency=3, prompt_tokens=50, new_tokens=3000, limit_s=1.0)
    with BenchClient(server.url) as client:
        row, _, _ = measure_load(client, load, [], SILENT)
        assert row.cut
        assert 0 < row.num_tokens < 3 * 2999
        empty(client)  # refuses while anything runs


def test_a_profile_of_a_real_server_is_asked_for_and_comes(
    server: LocalServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiled, "ACTIVITIES", ("CPU",))  # all that a CPU has
    steps = 3
    load = Load(concurrency=3, new_tokens=3000).half_way(recorded_steps(steps), kv_capacity=16384)
    with BenchClient(server.url) as client:
        with pytest.raises(DataError, match="no activity of a GPU"):  # a whole trace was read
            profiled.record(client, load, vocabulary(str(tiny_model)), steps)
        empty(client)  # refuses while anything runs


def test_several_samples_of_one_request_leave_nothing_that_hangs_the_end(
    server: LocalServer,
) -> None:
    """Last in this file, because it ends the server."""
    server.ask_copies(short_prompts()[0], SAMPLES)
    assert not server.end_by_sigterm(ENDS_WITHIN_S).left
