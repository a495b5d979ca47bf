"""Lossless drafting on a GPU: the dense server's tokens, or another token of a near tie."""

import json
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
LOSSLESS = {"policy": "lossless", "draft_tokens": NUM_DRAFTS, "select_layers": [2, 4]}
DENSE = ({"policy": "full"}, {"sampling_backend": "lim"})
SETTINGS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "dense": DENSE,
    "dense-in-small-batches": (DENSE[0], {**DENSE[1], "max_running_requests": 5}),
    "dense-no-overlap": (DENSE[0], {**DENSE[1], "disable_overlap_schedule": True}),
    "lossless": ({**LOSSLESS, "budget": BUDGET}, {}),
    "one-list": ({**LOSSLESS, "budget": BUDGET, "select_layers": [3], "draft_tokens": 3}, {}),
    "by-mass": ({**LOSSLESS, "budget": BUDGET, "ranking": "mass"}, {}),
    "auto": ({**LOSSLESS, "budget": BUDGET, "draft_tokens": "auto"}, {}),
    "no-overlap": ({**LOSSLESS, "budget": BUDGET}, {"disable_overlap_schedule": True}),
    "no-graphs": ({**LOSSLESS, "budget": BUDGET}, {"disable_cuda_graph": True}),
}
"""Settings of ours and of SGLang's, by server."""


DRAFTING = [name for name, (ours, _) in SETTINGS.items() if ours is not DENSE[0]]
GIVEN = [name for name in DRAFTING if name != "auto"]
"""Those that draft a given number of tokens."""


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

    def run(name: str) -> dict[str, Any]:
        ours, options = SETTINGS[name]
        given = {
            "model": str(model),
            "options": {"attention_backend": "lim", "dtype": SHAPES[SHAPE].dtype}
            | {"mem_fraction_static": 0.5, "max_total_tokens": 60_000, **options},
            "requests": bodies(num_top=VOCAB if name in ("dense", "dense-no-overlap") else 1),
        }
        audited = {**CHECKS, "LIM_AUDIT": "1", "LIM_CONFIG": json.dumps(ours)}
        found: dict[str, Any] = run_in_process("answer", given, os.environ | audited)
        return found

    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        yield {name: pool.submit(run, name) for name in SETTINGS}


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
    kept &= before <= sampling.get("top_p", 1.0) * (1 + slack)
    kept[logprobs.argmax()] = True
    return kept


@pytest.mark.parametrize("name", DRAFTING)
def test_tokens_are_the_dense_servers_but_for_near_ties(runs: Runs, name: str) -> None:
    overlaps = name != "no-overlap"
    dense = runs["dense" if overlaps else "dense-no-overlap"].result()["results"]
    found, again = (runs[each].result()["results"] for each in (name, "dense-in-small-batches"))
    leads = leads_of(dense, found)
    if overlaps:  # then SGLang applies penalties a token late, or not, as requests come
        leads = {each: lost for each, lost in leads.items() if "penalty" not in each}
    others = leads_of(runs["dense"].result()["results"], again)
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


@pytest.mark.parametrize("name", GIVEN)
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


def test_small_models_need_no_drafts_at_short_contexts(runs: Runs) -> None:
    state = runs["auto"].result()["lim"]
    sys.stdout.write(json.dumps(state) + "\n")
    assert state["draft_tokens"] == 8  # 64 queries a KV head, of 7 heads each: 9 tokens
    assert state["cycles_undrafted"]["cost"] > state["cycles"] / 2


@pytest.mark.parametrize("name", ["no-graphs", "no-overlap"])
def test_graphs_and_overlap_change_no_acceptance(runs: Runs, name: str) -> None:
    shares = []
    for each in ("lossless", name):
        state = runs[each].result()["lim"]
        shares.append(state["accepted_tokens"] / state["drafted_tokens"])
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


def serve_crowd(model: Path, ours: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Run an engine under the crowd."""
    given = {"model": str(model), "options": {"attention_backend": "lim", **options}}
    audited = {**RETRACTING, "LIM_AUDIT": "1", "LIM_CONFIG": json.dumps(ours)}
    found: dict[str, Any] = run_in_process("serve_crowd", given, os.environ | audited)
    return found


def test_a_crowd_loses_nothing_and_gets_the_dense_servers_tokens(model: Path) -> None:
    """Requests come, finish, abort, share prefixes and are retracted."""
    wanted = {name: SETTINGS[name] for name in ("dense", "lossless")}
    wanted["dense-without-graphs"] = (DENSE[0], {**DENSE[1], "disable_cuda_graph": True})
    with ThreadPoolExecutor(len(wanted)) as pool:
        runs = {
            name: pool.submit(serve_crowd, model, ours, **options)
            for name, (ours, options) in wanted.items()
        }
        dense, found, again = (runs[name].result() for name in wanted)
    kept = [number for number in range(NUM_REQUESTS) if not is_aborted(number)]
    requests = make_requests()
    for number in kept:
        assert len(found["answers"][number]["tokens"]) == requests[number]["num_tokens"]
    same, usual = (
        sum(each["answers"][n]["tokens"] == dense["answers"][n]["tokens"] for n in kept)
        for each in (found, again)
    )
    state = found["lim"]
    sys.stdout.write(f"{same} of {len(kept)} equal dense, {usual} in another dense run\n")
    sys.stdout.write(json.dumps(state))
    assert same > usual - 0.2 * len(kept)
    assert state["retractions"] > 0
    assert state["checked_sets"] > 1000
    assert state["wrong_sets"] == 0
