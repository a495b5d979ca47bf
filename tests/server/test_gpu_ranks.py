"""Ranks of tensor parallelism on two GPUs: under a crowd of requests each step keeps, on each rank,
the set that the scores of all heads give."""

import shlex
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.processes import LIM_SERVE, serving, still_running
from tests.server import planted
from tests.server.gpu_rig import SHAPES, build_model, write_random_gates
from tests.server.in_process import NUM_REQUESTS, PAGE_SIZE, is_aborted, make_requests
from tests.server.test_gpu_race import SHAPE, Crowd, differing_requests, serve_crowd
from tests.server.tiny_model import random_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NUM_RANKS = 2
PICKING = {"select_layers": [2], "pick_layers": [4]}
TWO_RANKS = {"tp_size": NUM_RANKS}
PAGES = TWO_RANKS | {"page_size": PAGE_SIZE}
CROWDS = {
    "rank": Crowd(TWO_RANKS),
    "no-overlap": Crowd(TWO_RANKS | {"disable_overlap_schedule": True}),
    "fp8-cache": Crowd(TWO_RANKS | {"kv_cache_dtype": "fp8_e4m3"}),
    "small-pool": Crowd(TWO_RANKS | {"max_total_tokens": 8_000}),
    "pick-layers": Crowd(TWO_RANKS, settings=PICKING),
    "mass": Crowd(TWO_RANKS, settings={"select_layers": [2, 4], "ranking": "mass"}),
    "omnikv": Crowd(TWO_RANKS, settings={"policy": "omnikv", "select_layers": [2, 4]}),
    "tidal": Crowd(TWO_RANKS, settings={"policy": "tidal", "select_layers": [2, 4]}),
    "streaming": Crowd(TWO_RANKS, settings={"policy": "streaming"}),
    "quest": Crowd(PAGES, settings={"policy": "quest"}),
    "quest-all": Crowd(PAGES, settings={"policy": "quest", "shared_by": "all"}),
    "seer": Crowd(PAGES, settings={"policy": "seer"}),
}
PLANTED = ("rank", "mass", "omnikv", "quest-all")
"""Crowds with a kind of exchange each."""
ENGINES_AT_ONCE = 5
GONE_WITHIN_S = 10.0
ON_GPU = "--mem-fraction-static 0.3 --max-total-tokens 8000 --dtype float16"

Results = dict[str, Future[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random model of 14 query heads and 2 KV heads."""
    return build_model(tmp_path_factory.mktemp("ranks") / "model", SHAPE)


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Run all crowds, the dense one, and one with a rank that merges its own turns alone."""
    gates, shape = tmp_path_factory.mktemp("gates") / "gates", SHAPES[SHAPE]
    write_random_gates(gates, shape.heads, shape.kv_heads, shape.dim, torch.float16)
    seer = Crowd(PAGES, settings={"policy": "seer", "gate": str(gates)})
    environment = planted.sitecustomize(
        tmp_path_factory.mktemp("planted"), planted.ALONE, planted.EXCHANGE
    )
    wanted = {("lim", name): crowd for name, crowd in (CROWDS | {"seer": seer}).items()}
    wanted["flashinfer", "dense"] = Crowd(TWO_RANKS)
    for name in PLANTED:
        wanted["lim", f"planted {name}"] = replace(CROWDS[name], environment=environment)
    with ThreadPoolExecutor(ENGINES_AT_ONCE) as pool:
        yield {
            name: pool.submit(serve_crowd, model, backend, crowd)
            for (backend, name), crowd in wanted.items()
        }


@pytest.mark.parametrize("name", CROWDS)
def test_each_rank_keeps_and_reads_the_set_of_all_heads(results: Results, name: str) -> None:
    state = results[name].result()["lim"]
    assert state["ranks"] == state["live_ranks"] == NUM_RANKS
    assert state["retractions"] > 0
    assert state["sparse_rows"] > 1000
    assert state["checked_sets"] > 4000
    assert state["checked_outputs"] > 4000
    wrong = {name: count for name, count in state.items() if name.startswith("wrong")}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("name", CROWDS)
def test_the_crowd_finishes(results: Results, name: str) -> None:
    answers = results[name].result()["answers"]
    wanted = [request["num_tokens"] for request in make_requests()]
    found = [len(answer["tokens"]) for answer in answers]
    assert [found[n] for n in range(NUM_REQUESTS) if not is_aborted(n)] == [
        wanted[n] for n in range(NUM_REQUESTS) if not is_aborted(n)
    ]


def test_within_the_budget_tokens_are_those_of_dense_ranks(results: Results) -> None:
    """But for near ties: batches differ in size, as dense ones do from run to run."""
    pairs = list(
        zip(results["rank"].result()["answers"], results["dense"].result()["answers"], strict=True)
    )
    differing = differing_requests(pairs, short=True)
    assert sum(differing) <= 0.3 * len(differing)


@pytest.mark.parametrize("name", PLANTED)
def test_a_rank_that_selects_otherwise_is_caught_by_the_audit(results: Results, name: str) -> None:
    state = results[f"planted {name}"].result()["lim"]
    assert state["wrong_sets"] > 100


@pytest.mark.parametrize("victim", ["TP0", "TP1"])
def test_a_server_ends_with_any_of_its_ranks(victim: str, model: Path, tmp_path: Path) -> None:
    """In the middle of a decode step, in which the other rank waits on the GPU."""
    options = ("--tp-size 2 --skip-tokenizer-init --disable-prefill-cuda-graph", ON_GPU)
    words = shlex.join([*LIM_SERVE, str(model), "--lim-select-layers", "2,4"])
    command = ["sh", "-c", f'exec {words} "$@" -- {" ".join(options)}', "sh"]
    body = {
        "input_ids": random_prompt(300, 1),
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
        "stream": True,
    }
    with serving(command, folder=tmp_path, settings={"SGLANG_USE_CPU_ENGINE": "0"}) as server:
        lines = {process: " ".join(process.cmdline()) for process in server.tree()}
        [rank] = [each for each, line in lines.items() if f"scheduler_{victim}" in line]
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as stream:
            next(stream.iter_lines())
            rank.kill()
            assert not still_running(list(lines), GONE_WITHIN_S)
    assert f"scheduler_{victim} (process {rank.pid}) " in (tmp_path / "server.log").read_text()
