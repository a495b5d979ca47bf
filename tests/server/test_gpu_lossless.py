"""Lossless drafting on a GPU: the dense server's tokens, or another token of a near tie."""

import json
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from lim_sglang.kernels.reference_sampling import exponential_noise, hash_tokens
from tests.processes import CHECKS
from tests.server.gpu_rig import SHAPES, build_model
from tests.server.in_process import (
    NUM_REQUESTS,
    RETRACTING,
    is_aborted,
    make_requests,
    run_in_process,
)

pytestmark = pytest.mark.gpu

SHAPE = "coder-0.5b"
BUDGET, NUM_DRAFTS = 256, 8
VOCAB = 1024
LENGTHS = (5, 100, 250, 256, 257, 300, 700, 1500)
NUM_ASKED = 64
NUM_NEW = 64
NEAR = 0.1
"""Nats by which the winner of a race may lead in float16, where another batch may exchange it."""
ROUNDING = 1e-6
"""Of sums of probabilities in f32."""
LOSSLESS = {"policy": "lossless", "draft_tokens": NUM_DRAFTS, "select_layers": [2, 4]}
DENSE = ({"policy": "full"}, {"sampling_backend": "lim"})
SETTINGS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "dense": DENSE,
    "dense-in-small-batches": (DENSE[0], {**DENSE[1], "max_running_requests": 5}),
    "lossless": ({**LOSSLESS, "budget": BUDGET}, {}),
    "one-list": ({**LOSSLESS, "budget": BUDGET, "select_layers": [3], "draft_tokens": 3}, {}),
    "by-mass": ({**LOSSLESS, "budget": BUDGET, "ranking": "mass"}, {}),
    "auto": ({**LOSSLESS, "budget": BUDGET, "draft_tokens": "auto"}, {}),
    "no-overlap": ({**LOSSLESS, "budget": BUDGET}, {"disable_overlap_schedule": True}),
    "unaudited": ({**LOSSLESS, "budget": BUDGET}, {"disable_prefill_cuda_graph": False}),
    "no-graphs": ({**LOSSLESS, "budget": BUDGET}, {"disable_cuda_graph": True}),
}
"""Settings of ours and of SGLang's, by server."""
WITHOUT_AUDIT = ("unaudited", "auto")
"""Servers whose host never waits for a cycle before it launches the next, as an audit does."""
DRAFTING = [name for name, (ours, _) in SETTINGS.items() if ours is not DENSE[0]]
GIVEN = [name for name in DRAFTING if name != "auto"]
"""Those that draft a given number of tokens."""
AUDITED = [name for name in GIVEN if name not in WITHOUT_AUDIT]


def bodies(*, num_top: int = 1) -> list[dict[str, Any]]:
    """Return requests, half of them greedy, the others with seeds and some with filters.

    Args:
        num_top: likeliest tokens whose logprobs are asked for.
    """
    rng = random.Random(5)
    found = []
    for number in range(NUM_ASKED):
        sampling: dict[str, Any] = {"max_new_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True}
        if number % 2:
            sampling |= {"temperature": rng.choice([0.6, 1.0]), "sampling_seed": number}
        if number % 4 == 3:
            sampling |= rng.choice([{"top_p": 0.95}, {"top_k": 20}, {"min_p": 0.05}])
        if number % 16 == 8:
            sampling |= {"frequency_penalty": 0.5}
        prompt = [rng.randrange(5, 1000) for _ in range(LENGTHS[number % len(LENGTHS)])]
        found.append(
            {"input_ids": prompt, "sampling_params": sampling}
            | {"return_logprob": True, "top_logprobs_num": num_top}
        )
    return found


Runs = Mapping[str, Future[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model."""
    return build_model(tmp_path_factory.mktemp("lossless") / "model", SHAPE)


@pytest.fixture(scope="module")
def runs(model: Path) -> Iterator[Runs]:
    """Run all servers; they share the GPU."""
    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        yield {name: pool.submit(run_server, model, name) for name in SETTINGS}


def run_server(model: Path, name: str) -> dict[str, Any]:
    """Run an engine of some settings that answers all requests."""
    ours, options = SETTINGS[name]
    given = {
        "model": str(model),
        "options": {"attention_backend": "lim", "dtype": SHAPES[SHAPE].dtype}
        | {"mem_fraction_static": 0.5, "max_total_tokens": 60_000, **options},
        "requests": bodies(num_top=VOCAB if name == "dense" else 1),
    }
    audit = {} if name in WITHOUT_AUDIT else {"LIM_AUDIT": "1"}
    return answer(given, ours, **audit)


def answer(given: Mapping[str, Any], ours: Mapping[str, Any], **environment: str) -> dict[str, Any]:
    """Run an engine that answers requests."""
    changed = {**CHECKS, **environment, "LIM_CONFIG": json.dumps(ours)}
    found: dict[str, Any] = run_in_process("answer", given, os.environ | changed)
    return found


def tokens_of(result: Mapping[str, Any]) -> list[int]:
    """Return the tokens of an answer."""
    return list(result["output_ids"])


def lead(body: Mapping[str, Any], dense: Mapping[str, Any], at: int, token: int) -> float:
    """Return by how many nats another token loses the race for a place, by the dense server's
    logprobs; infinite if a filter drops the token, whatever the rounding.

    Rivals are the tokens that every filter keeps by more than the rounding.
    """
    sampling = body["sampling_params"]
    logprobs = torch.full((VOCAB,), -torch.inf)
    for logprob, each, _ in dense["meta_info"]["output_top_logprobs"][at]:
        logprobs[each] = logprob
    race = logprobs.clone()
    if sampling["temperature"]:
        position = torch.tensor([len(body["input_ids"]) + at - 1])
        hashes = hash_tokens(torch.tensor([sampling["sampling_seed"]]), position, VOCAB)
        race -= exponential_noise(hashes)[0].log()
    is_kept, is_sure = (keeps(logprobs, sampling, slack) for slack in (NEAR, -NEAR))
    if not is_kept[token]:
        return float("inf")
    return float(race[is_sure].max() - race[token])


def keeps(logprobs: torch.Tensor, sampling: Mapping[str, Any], slack: float) -> torch.Tensor:
    """Return which tokens the filters keep if each logprob may be wrong by `slack` nats, [V]; a
    negative one asks which they keep in any case."""
    ordered = logprobs.sort(descending=True).values
    probs = logprobs.exp()
    least = ordered[0] + math.log(sampling.get("min_p", 0) or 1e-30)
    kept = logprobs >= least - slack
    kept &= logprobs >= ordered[min(sampling.get("top_k", VOCAB), VOCAB) - 1] - slack
    before = torch.stack([probs[logprobs > each + slack].sum() for each in logprobs])
    top_p = sampling.get("top_p", 1.0)
    kept &= before <= top_p + (1 - top_p) * slack + ROUNDING
    kept[logprobs.argmax()] = True
    return kept


@pytest.mark.parametrize("name", DRAFTING)
def test_tokens_are_the_dense_servers_but_for_near_ties(runs: Runs, name: str) -> None:
    dense, found = runs["dense"].result()["results"], runs[name].result()["results"]
    again = runs["dense-in-small-batches"].result()["results"]
    leads, others = leads_of(dense, found), leads_of(dense, again)
    sys.stdout.write(f"{name}: {len(leads)} of {NUM_ASKED} differ, by {leads}\n")  # with -rP
    sys.stdout.write(f"dense in small batches: {len(others)} differ, by {others}\n")
    assert all(each < NEAR for each in leads.values())
    assert len(leads) < NUM_ASKED / 2


def leads_of(dense: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, float]:
    """Return by how much the other token loses at the first difference of each answer.

    Returns:
        by number and sampling parameters of the request.
    """
    leads = {}
    for number, (body, one, other) in enumerate(zip(bodies(), dense, found, strict=True)):
        expected, tokens = tokens_of(one), tokens_of(other)
        assert len(tokens) == NUM_NEW
        if expected != tokens:
            at = next(n for n in range(NUM_NEW) if expected[n] != tokens[n])
            name = f"{number} {body['sampling_params']}"
            leads[name] = round(lead(body, one, at, tokens[at]), 4)
    return leads


@pytest.mark.parametrize("name", AUDITED)
def test_lists_are_the_definitions_and_drafts_are_accepted(runs: Runs, name: str) -> None:
    state = runs[name].result()["lim"]
    sys.stdout.write(json.dumps(state) + "\n")
    assert state["checked_sets"] > 500
    assert state["wrong_sets"] == state["unchecked_steps"] == 0
    assert state["drafted_tokens"] > 5000
    assert set(state["rows_capped"]) == {"penalty"}
    assert set(state["cycles_by_width"]) <= {"1", str(1 + state["draft_tokens"])}


@pytest.mark.parametrize("name", GIVEN)
def test_drafts_that_read_everything_are_accepted(runs: Runs, name: str) -> None:
    """Requests within the budget, in batches with longer ones."""
    found = runs[name].result()
    width = 1 + found["lim"]["draft_tokens"]
    cycles = [
        result["meta_info"]["spec_verify_ct"]
        for body, result in zip(bodies(), found["results"], strict=True)
        if len(body["input_ids"]) + NUM_NEW <= BUDGET
        and "frequency_penalty" not in body["sampling_params"]
    ]
    fewest = -(-(NUM_NEW - 1) // width)
    assert len(cycles) > 10
    assert sorted(cycles)[: len(cycles) // 2] == [fewest] * (len(cycles) // 2)
    assert sum(cycles) <= 1.15 * fewest * len(cycles)


def test_small_models_need_no_drafts_at_short_contexts(runs: Runs, model: Path) -> None:
    wait(runs.values())
    # Alone: beside other servers every cycle waits, so that drafts cost nothing.
    state = run_server(model, "auto")["lim"]
    sys.stdout.write(json.dumps(state) + "\n")
    assert state["draft_tokens"] == 8  # 64 queries a KV head, of 7 heads each: 9 tokens
    assert state["cycles_undrafted"]["cost"] > state["cycles"] / 2


@pytest.mark.parametrize("name", ["no-graphs", "no-overlap", "unaudited"])
def test_graphs_overlap_and_audit_change_no_acceptance(runs: Runs, name: str) -> None:
    shares = []
    for each in ("lossless", name):
        state = runs[each].result()["lim"]
        shares.append(state["accepted_tokens"] / state["drafted_tokens"])
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


def serve_crowd(model: Path, name: str) -> dict[str, Any]:
    """Run a server under the crowd."""
    ours, options = SETTINGS[name]
    given = {"model": str(model), "options": {"attention_backend": "lim", **options}}
    audit = {} if name in WITHOUT_AUDIT else {"LIM_AUDIT": "1"}
    environment = {**RETRACTING, **audit, "LIM_CONFIG": json.dumps(ours)}
    found: dict[str, Any] = run_in_process("serve_crowd", given, os.environ | environment)
    return found


Crowds = Mapping[str, dict[str, Any]]
"""What each server has answered to the crowd."""


@pytest.fixture(scope="module")
def crowds(model: Path) -> Crowds:
    """Serve the crowd: requests come, finish, abort, share prefixes and are retracted."""
    names = ("dense", "dense-in-small-batches", "lossless", "unaudited")
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda name: serve_crowd(model, name), names), strict=True))


def crowd_leads(model: Path, dense: dict[str, Any], found: dict[str, Any]) -> dict[int, float]:
    """Return by how many nats a token loses where an answer first differs from the dense server's:
    the other server's token or, if it lost to neither, the dense server's.

    The dense model is asked again for the logprobs of these tokens, in other batches.
    """
    requests, places = make_requests(), {}
    for number in range(NUM_REQUESTS):
        expected, tokens = (each["answers"][number]["tokens"] for each in (dense, found))
        if not is_aborted(number) and expected != tokens:
            at = next(n for n in range(len(expected)) if expected[n] != tokens[n])
            prompt = [*requests[number]["prompt"], *expected[:at]]
            places[number] = prompt, expected[at], tokens[at]
    bodies = [
        {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        | {"return_logprob": True, "top_logprobs_num": VOCAB}
        for prompt, *_ in places.values()
    ]
    ours, options = SETTINGS["dense"]
    given = {"model": str(model), "requests": bodies}
    given |= {"options": {"attention_backend": "lim", "dtype": "float16", **options}}
    leads = {}
    for (number, (_, *both)), result in zip(
        places.items(), answer(given, ours)["results"], strict=True
    ):
        (tops,) = result["meta_info"]["output_top_logprobs"]
        logprobs = {token: logprob for logprob, token, _ in tops}
        leads[number] = round(tops[0][0] - min(logprobs[token] for token in both), 4)
    return leads


@pytest.mark.parametrize("name", ["dense-in-small-batches", "lossless", "unaudited"])
def test_a_crowd_loses_nothing_and_gets_the_dense_servers_tokens(
    model: Path, crowds: Crowds, name: str
) -> None:
    dense, found = crowds["dense"], crowds[name]
    requests = make_requests()
    for number in range(NUM_REQUESTS):
        if not is_aborted(number):
            assert len(found["answers"][number]["tokens"]) == requests[number]["num_tokens"]
    leads = crowd_leads(model, dense, found)
    sys.stdout.write(f"{name}: {len(leads)} of {NUM_REQUESTS} differ, by {leads}\n")  # with -rP
    sys.stdout.write(json.dumps(found["lim"]))
    assert all(each < NEAR for each in leads.values())
    assert len(leads) < NUM_REQUESTS / 2


def test_lists_of_a_crowd_are_the_definitions(crowds: Crowds) -> None:
    state = crowds["lossless"]["lim"]
    assert state["retractions"] > 0
    assert state["checked_sets"] > 1000
    assert state["wrong_sets"] == 0
