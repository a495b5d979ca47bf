"""No race: under a crowd of requests, every step keeps and reads the tokens of its own snapshot."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from lim_sglang.attention_backend import DENSE_PASS, SECOND_READING
from lim_sglang.compat import missing_backend
from tests.server.gpu_rig import NUM_LAYERS, SHAPES, build_model, write_random_gates
from tests.server.in_process import (
    NUM_REQUESTS,
    PAGE_SIZE,
    RETRACTING,
    is_aborted,
    make_requests,
    run_in_process,
)

pytestmark = pytest.mark.gpu

SHAPE = "coder-0.5b"  # heads whose dense pass leaves the scores behind
BUDGET = 256
LESSISMORE = {"select_layers": [2, 4]}
ENGINES_AT_ONCE = 6
LORA_RANK = 8


@dataclass(frozen=True)
class Crowd:
    """An engine's differences from SGLang's defaults."""

    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=lambda: LESSISMORE)


ORDERS = {
    "overlap": Crowd(),
    "no-overlap": Crowd({"disable_overlap_schedule": True}),
    "coarse-barrier": Crowd(environment={"SGLANG_FORCE_COARSE_WAR_BARRIER": "1"}),
}
"""Ways in which SGLang orders the host's and the GPU's work."""
BESIDE = {
    "fp8-cache": Crowd({"kv_cache_dtype": "fp8_e4m3"}),
    "pages-of-16": Crowd({"page_size": 16}),
    "fa3-prefill": Crowd({"prefill_attention_backend": "fa3"}),
    "triton-prefill": Crowd({"prefill_attention_backend": "triton"}),
    "lora": Crowd({"enable_lora": True, "max_lora_rank": LORA_RANK}),
    "small-pool": Crowd({"max_total_tokens": 8_000}),
}
"""Features of SGLang that are used together with ours."""
PAGES = {"page_size": PAGE_SIZE}
SUMMARIZED = {
    "quest": Crowd(PAGES, settings={"policy": "quest"}),
    "quest-all": Crowd(PAGES, settings={"policy": "quest", "shared_by": "all"}),
    "seer": Crowd(PAGES, settings={"policy": "seer"}),
}
"""Policies whose summaries of blocks live beside the KV cache."""


def build_adapter(folder: Path) -> Path:
    """Write a random LoRA adapter for the attention's projections."""
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shape = SHAPES[SHAPE]
    narrow = dict.fromkeys(("k_proj", "v_proj"), shape.kv_heads * shape.dim)
    generator = torch.Generator().manual_seed(4)

    def randn(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / shape.hidden**0.5).half()

    weights = {}
    for layer in range(NUM_LAYERS):
        for module in settings["target_modules"]:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = randn(LORA_RANK, shape.hidden)
            width = narrow.get(module, shape.hidden)
            weights[f"{name}.lora_B.weight"] = randn(width, LORA_RANK)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def serve_crowd(model: Path, backend: str, crowd: Crowd) -> dict[str, Any]:
    """Run an engine under the crowd; return its answers and the state of LessIsMore."""
    options = {"attention_backend": backend, **crowd.options}
    if "prefill_attention_backend" in options:
        options["decode_attention_backend"] = options.pop("attention_backend")
    config = json.dumps({"budget": BUDGET, **crowd.settings})
    audited = {**RETRACTING, "LIM_AUDIT": "1", "LIM_CONFIG": config}
    environment = os.environ | audited | crowd.environment
    given = {"model": str(model), "options": options}
    found: dict[str, Any] = run_in_process("serve_crowd", given, environment)
    return found


Crowds = dict[tuple[str, str], Future[dict[str, Any]]]
"""Results by backend and name."""


@pytest.fixture(scope="module")
def crowds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowds]:
    """Run all crowds; several engines share the GPU."""
    folder = tmp_path_factory.mktemp("crowd")
    model = build_model(folder / "model", SHAPE)
    adapter = build_adapter(folder / "adapter")
    with_adapter = {**BESIDE["lora"].options, "lora_paths": {"adapter": str(adapter)}}
    gates = folder / "gates"
    shape = SHAPES[SHAPE]
    write_random_gates(gates, shape.heads, shape.kv_heads, shape.dim, torch.float16)
    with_gates = replace(SUMMARIZED["seer"], settings={"policy": "seer", "gate": str(gates)})
    ours = ORDERS | BESIDE | {"lora": Crowd(with_adapter)} | SUMMARIZED | {"seer": with_gates}
    wanted = {("lim", name): crowd for name, crowd in ours.items()}
    wanted |= {("flashinfer", name): crowd for name, crowd in ORDERS.items()}
    with ThreadPoolExecutor(ENGINES_AT_ONCE) as pool:
        yield {key: pool.submit(serve_crowd, model, key[0], crowd) for key, crowd in wanted.items()}


def result_of(crowds: Crowds, name: str) -> dict[str, Any]:
    """Return the result of one of our crowds; skip the test if this GPU cannot run it."""
    backend = ORDERS.get(name, BESIDE.get(name, Crowd())).options.get("prefill_attention_backend")
    if backend and (why := missing_backend(backend)):
        pytest.skip(f"{backend}: {why}")
    return crowds["lim", name].result()


@pytest.mark.parametrize("name", [*ORDERS, *BESIDE])
def test_every_step_keeps_and_reads_the_set_of_its_own_snapshot(crowds: Crowds, name: str) -> None:
    state = result_of(crowds, name)["lim"]
    assert state["score_source"] == (SECOND_READING if name == "fp8-cache" else DENSE_PASS)
    assert state["retractions"] > 0
    assert state["sparse_rows"] > 1000
    assert state["checked_sets"] > 2000
    assert state["checked_outputs"] > 2000
    assert (state["wrong_sets"], state["wrong_outputs"]) == (0, 0)


def test_steps_that_outgrow_the_room_of_selection_are_counted(crowds: Crowds) -> None:
    """Requests that share prefixes have more tokens together than a small pool has slots."""
    state = result_of(crowds, "small-pool")["lim"]
    assert state["oversized_steps"] == state["unchecked_steps"] > 0


@pytest.mark.parametrize("name", SUMMARIZED)
def test_summaries_are_those_of_the_keys_in_the_cache(crowds: Crowds, name: str) -> None:
    """Hits, chunks, retractions, reused pages and equal prompts leave no summary behind."""
    state = result_of(crowds, name)["lim"]
    assert state["retractions"] > 0
    assert state["checked_sets"] > 2000
    assert state["checked_summaries"] > 100_000
    wrong = ("wrong_sets", "wrong_outputs", "wrong_summaries")
    assert [state[count] for count in wrong] == [0, 0, 0]
    assert state["unchecked_steps"] == state["oversized_steps"] < state["decode_steps"] / 10


@pytest.mark.parametrize("name", [*ORDERS, *BESIDE, *SUMMARIZED])
def test_the_crowd_comes_finishes_aborts_and_shares_prefixes(crowds: Crowds, name: str) -> None:
    answers = result_of(crowds, name)["answers"]
    wanted = [request["num_tokens"] for request in make_requests()]
    found = [len(answer["tokens"]) for answer in answers]
    completed = [found[n] == wanted[n] for n in range(NUM_REQUESTS)]
    assert all(completed[n] for n in range(NUM_REQUESTS) if not is_aborted(n))
    assert not all(completed[n] for n in range(NUM_REQUESTS) if is_aborted(n))
    assert sum(answer["cached"] > 0 for answer in answers) > NUM_REQUESTS // 4


def test_how_often_tokens_differ_is_shown_beside_dense_sglang(crowds: Crowds) -> None:
    """Other batches round in other ways, which a sparse row amplifies and a dense row does not."""
    counts = {}
    for backend in ("lim", "flashinfer"):
        answers = {name: crowds[backend, name].result()["answers"] for name in ORDERS}
        for one, other in combinations(ORDERS, 2):
            pairs = list(zip(answers[one], answers[other], strict=True))
            for kind in ("sparse", "short"):
                differing = differing_requests(pairs, short=kind == "short")
                name = f"{backend}, {kind}, {one} / {other}"
                counts[name] = (sum(differing), len(differing))
    sys.stdout.write(json.dumps(counts) + "\n")  # shown with -rP, for docs/log
    # A request within the budget reads everything: LessIsMore may change nothing in it.
    lim, dense = (
        sum(differing / of for name, (differing, of) in counts.items() if name.startswith(kind))
        for kind in ("lim, short", "flashinfer, short")
    )
    assert lim <= dense + 0.3


def differing_requests(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], *, short: bool
) -> list[bool]:
    """Return for each completed request True if its two runs gave other tokens.

    Retracted requests are left out: they are prefilled again, densely, so that their later steps
    read another cache.

    Args:
        short: take the requests that stay within the budget, or those that do not.
    """
    found = [
        one["tokens"] != other["tokens"]
        for number, (request, (one, other)) in enumerate(zip(make_requests(), pairs, strict=True))
        if short == (len(request["prompt"]) + request["num_tokens"] <= BUDGET)
        and not is_aborted(number)
        and not one["retractions"]
        and not other["retractions"]
    ]
    assert len(found) >= 5
    return found
