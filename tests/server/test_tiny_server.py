"""A real server on the tiny model: its tokens and sets are the oracle's, whatever else happens."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
from transformers import AutoModelForCausalLM

from lim_sglang.kernels.reference_sampling import coupled_pick
from tests.conftest import DenseServer, DenseTokens
from tests.processes import Answer, Client, LocalServer, disagreements, new_rid
from tests.server.oracle import OracleRun
from tests.server.tiny_model import (
    BUDGET,
    NUM_LAYERS,
    NUM_NEW,
    SELECT_LAYERS,
    Prompt,
    crossing_prompts,
    long_prompts,
    short_prompts,
)

pytestmark = pytest.mark.e2e

Run = Callable[[Prompt], OracleRun]

COUNTERS = ("dense_rows", "sparse_rows", "tokens_kept", "tokens_seen", "retractions")
SAMPLES = 3
ENDS_WITHIN_S = 20.0


@pytest.fixture
def server(tiny_server: LocalServer) -> LocalServer:
    """Return the session's server."""
    return tiny_server


def counters(server: Client) -> dict[str, int]:
    """Return the counters of rows, and `decode_steps`."""
    state = server.lim()
    return {name: state[name] for name in ("decode_steps", *COUNTERS)}


def counted_rows(prompts: Sequence[Prompt]) -> dict[str, int]:
    """Return the increments of the row counters by answers to these prompts.

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


LIMITS = {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "min_p": 0.02}


def test_a_seed_gives_the_tokens_of_the_definition_alone_and_among_others(
    server: LocalServer, tiny_model: Path
) -> None:
    prompts, seeds = short_prompts(), [5, 2**40 + 1, -7]
    together = server.ask_sampled(prompts, seeds, **LIMITS)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for prompt, seed, answer in zip(prompts, seeds, together, strict=True):
        (alone,) = server.ask_sampled([prompt], [seed], **LIMITS)
        assert alone.tokens == answer.tokens
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer.tokens[:-1]]])).logits[0]
        probs = (logits[len(prompt) - 1 :] / LIMITS["temperature"]).softmax(-1)
        count = len(probs)
        picked = coupled_pick(
            probs,
            torch.full((count,), seed),
            torch.arange(len(prompt) - 1, len(prompt) - 1 + count),
            torch.full((count,), LIMITS["top_k"]),
            torch.full((count,), LIMITS["top_p"]),
            torch.full((count,), LIMITS["min_p"]),
        )
        assert picked.tolist() == list(answer.tokens)


def test_sample_i_of_a_request_has_its_seed_plus_i(server: LocalServer) -> None:
    prompt = short_prompts()[0]
    samples = server.ask_sampled([prompt], [100], **LIMITS, n=3)
    single = server.ask_sampled([prompt] * 3, [100, 101, 102], **LIMITS)
    assert [each.tokens for each in samples] == [each.tokens for each in single]
    assert len({each.tokens for each in samples}) == 3


def test_without_a_seed_each_request_has_noise_of_its_own(server: LocalServer) -> None:
    answers = server.ask_sampled([short_prompts()[0]] * 2, [None, None], temperature=1.0)
    assert answers[0].tokens != answers[1].tokens


def test_a_live_server_without_the_plugin_is_not_taken_for_ours(dense: DenseServer) -> None:
    assert "decodes without LessIsMore" in dense.verdict


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
    answer = server.ask(prompt)
    assert answer.cached_tokens == len(start)
    assert not disagreements(server, [answer], [tiny_run(prompt)])


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
        next(stream)  # the first tokens: from here on the requests run side by side
    server.abort(rid)
    answers = [last(stream) for stream in streams]
    end = last(aborted)

    assert end.finish == "abort"
    assert end.tokens[:NUM_NEW] == tiny_run(prompt).tokens[: len(end.tokens)]
    assert not disagreements(server, answers, [tiny_run(other) for other in others])
    assert max(server.steps(rid)) < max(server.steps(rids[-1])), "the abort came too late"


def last(stream: Iterator[Answer]) -> Answer:
    """Return the final state of a streamed answer."""
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


def test_several_samples_of_one_request_leave_nothing_that_hangs_the_end(
    server: LocalServer,
) -> None:
    """Last in this file, because it ends the server."""
    server.ask_copies(short_prompts()[0], SAMPLES)
    assert not server.end_by(SIGTERM, ENDS_WITHIN_S).left
