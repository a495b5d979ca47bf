"""`lim bench serve`: long generations side by side over HTTP, one server per policy, one load.

SGLang's benchmark client sends requests and records when tokens arrive. The client's output for a
request has `start_time`, `ttft` (0 without a token) and `itl` (a latency for each token after the
first event) in seconds, and `output_len` in tokens.
"""

import asyncio
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lim_sglang.bench.model_runner import run_in_child
from lim_sglang.bench.results import NONE, surroundings
from lim_sglang.bench.verify import require_exact_kernels
from lim_sglang.bench.workloads import ModelChoice
from lim_sglang.config import BACKEND, lim_state
from lim_sglang.errors import ConfigError, LimError, ServerError
from lim_sglang.launch.server import (
    ServerSpec,
    decode_backend,
    free_port,
    local_client,
    running_server,
    server_options,
)
from lim_sglang.markdown_section import markdown_table

Times = NDArray[np.float64]

NOTES = (
    "measured by SGLang's benchmark client over HTTP, from the last first token of the requests "
    "that began together to the last token of all",
    "the first event of each stream belongs to prefill and is not counted",
    "the tokens of one event share the time since the event before evenly",
    "no request replaces one that has ended",
    "the speed-up compares the seconds for the same number of tokens; a run whose KV cache had no "
    "room for all tokens, so that requests were retracted, is not compared",
)
"""Method and limits, recorded with each row."""
VOCABULARY = 500  # token ids of prompts: each model has them
HEAD_START = 64
"""Tokens of the foremost stream after which a new stream has waited for room, not for prefill."""
LAST_S = 5.0  # length of the end of a run whose speed is shown by itself
FLUSH_S = 60.0  # time that a server may take to end earlier requests
FACTS = (
    "attention_backend decode_attention_backend load_format dtype kv_cache_dtype quantization "
    "page_size mem_fraction_static max_running_requests device chunked_prefill_size "
    "schedule_conservativeness disable_overlap_schedule disable_radix_cache "
    "incremental_streaming_output stream_interval"
)
"""Settings in `/server_info` that a number depends on."""


@dataclass(frozen=True)
class Load:
    """Requests of one size that are sent together; none replaces one that has ended."""

    concurrency: int
    prompt_tokens: int = 200
    new_tokens: int = 8192
    limit_s: float | None = None  # after which the run is cut; None for a whole run
    stream_interval: int = 1  # new tokens of a request that the server sends together
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ServeRow:
    """Result of one policy under one load, over the measured window."""

    policy: str
    concurrency: int
    tokens_per_s: float
    last_tokens_per_s: float  # over the last `LAST_S`
    ttft_ms: Mapping[str, float]  # time to first token: p50 and p99 over requests
    itl_ms: Mapping[str, float]  # inter-token latency: p50 and p99 over tokens
    kv_needed_share: float  # share of the KV cache that the tokens at the end of the run need
    retractions: int | None  # None: unknown, since a dense server does not count its retractions
    num_tokens: int  # decoded tokens: all but those of each stream's first event
    seconds: float
    cut: bool  # True if the time limit came before the last token
    sparse_rows: int | None  # rows that read less than all tokens; None for a dense server
    speedup: float | None  # over the fastest dense policy, for the same number of tokens


def measured_window(outputs: Sequence[Any]) -> tuple[Times, Times, float]:
    """Cut the measured window out of a run: from the last first token of the streams that began
    together to the last token of all.

    Returns:
        In seconds: the arrival of each decoded token after the window's start, in order; the
        inter-token latencies that began in the window, since earlier ones include prefill of other
        requests; the window's length.
    """
    times = [np.cumsum([each.start_time + each.ttft, *each.itl]) for each in outputs if each.ttft]
    settled_s = min((each[min(HEAD_START, len(each)) - 1] for each in times), default=0.0)
    start_s = max((each[0] for each in times if each[0] <= settled_s), default=0.0)
    end_s = max((each[-1] for each in times if len(each) > 1), default=0.0)
    if end_s <= start_s:
        raise LimError("too few tokens came: use more --new-tokens, or a longer --limit-seconds")
    decoded = np.sort(np.concatenate([each[1:] for each in times]))
    latencies = np.concatenate([np.diff(each)[each[:-1] >= start_s] for each in times])
    return decoded[decoded > start_s] - start_s, latencies, float(end_s - start_s)


def percentiles_ms(values_s: Sequence[float] | Times) -> dict[str, float]:
    """Return the smallest values that 50 and 99 % of all do not exceed."""
    p50, p99 = 1e3 * np.percentile(values_s, [50, 99], method="inverted_cdf")
    return {"p50": float(p50), "p99": float(p99)}


def equal_token_speedup(dense: Times, ours: Times) -> float:
    """Return the seconds of a dense run over ours for the same number of tokens, from the arrivals
    of both: so runs that a time limit has cut are compared over the same work."""
    last = min(len(dense), len(ours)) - 1
    return float(dense[last] / ours[last])


def make_row(
    policy: str,
    load: Load,
    outputs: Sequence[Any],
    kv_capacity: int,
    counted: tuple[int, int] | None,
    dense: list[Times],
) -> ServeRow:
    """Summarise a run.

    Args:
        kv_capacity: tokens.
        counted: sparse rows and retractions by our server's count; None for a dense server.
        dense: arrivals of the dense runs under this load; those of a dense run are added.
    """
    begun = [output for output in outputs if output.ttft]
    found, latencies, seconds = measured_window(outputs)
    num_tokens = sum(output.output_len for output in begun)
    held = load.prompt_tokens * load.concurrency + num_tokens
    sparse_rows, retractions = counted or (None, 0 if held <= kv_capacity else None)
    speedup = None
    if counted and retractions == 0:
        speedup = min((equal_token_speedup(each, found) for each in dense), default=None)
    elif retractions == 0:
        dense.append(found)
    return ServeRow(
        policy=policy,
        concurrency=load.concurrency,
        tokens_per_s=len(found) / seconds,
        last_tokens_per_s=float((found > seconds - LAST_S).sum() / min(LAST_S, seconds)),
        ttft_ms=percentiles_ms([output.ttft for output in begun]),
        itl_ms=percentiles_ms(latencies),
        kv_needed_share=held / kv_capacity,
        retractions=retractions,
        num_tokens=len(found),
        seconds=seconds,
        cut=num_tokens < load.concurrency * (load.new_tokens - load.stream_interval),
        sparse_rows=sparse_rows,
        speedup=speedup,
    )


def serve_table(rows: Sequence[ServeRow]) -> str:
    """Return all rows in Markdown, by concurrency, in the order of measurement."""
    titles = ["requests", "policy", "tokens/s", f"last {LAST_S:.0f} s", "speed-up", "TTFT p50, ms"]
    titles += ["p99", "ITL p50, ms", "p99", "KV cache", "retracted", "seconds", "run"]
    lines = [
        [
            f"{row.concurrency}",
            row.policy,
            f"{row.tokens_per_s:,.0f}",
            f"{row.last_tokens_per_s:,.0f}",
            f"{row.speedup:.2f}" if row.speedup else NONE,
            *(f"{value:,.0f}" for value in row.ttft_ms.values()),
            *(f"{value:.2f}" for value in row.itl_ms.values()),
            f"{100 * row.kv_needed_share:.0f} %",
            "unknown" if row.retractions is None else f"{row.retractions}",
            f"{row.seconds:.1f}",
            "cut" if row.cut else "whole",
        ]
        for row in sorted(rows, key=lambda row: row.concurrency)
    ]
    return markdown_table(titles, lines)


def own_servers(
    model: ModelChoice,
    policies: Sequence[str],
    loads: Sequence[Load],
    budget: int,
    words: tuple[str, ...],
    verbose: bool,
) -> Iterator[AbstractContextManager[Any]]:
    """Yield one server per policy, to be started and ended before the next one is asked for.

    Args:
        policies: attention backends; dense ones before ours, which is compared with them.
        words: SGLang's options, alike for all servers, whose log is shown with `verbose`.
    """
    if flags := [word for word in words if word.startswith("--lim-")]:
        raise ConfigError(f"{', '.join(flags)} would go to dense servers, too: set LIM_CONFIG")
    most = max(load.concurrency for load in loads)
    weights = ("--load-format", "dummy") if model.is_dummy else ()
    # Room for one more request: SGLang counts a prompt that chunked prefill has split as two
    # requests, and would hold one back.
    room = ("--max-running-requests", str(most + 1), "--cuda-graph-max-bs-decode", str(most))
    # As in the other benchmarks: prefill is not measured.
    fixed = ("--disable-prefill-cuda-graph", "--disable-flashinfer-autotune", "--random-seed", "0")
    # Without --incremental-streaming-output each event would repeat all text before it.
    words = (*weights, "--incremental-streaming-output", *room, *fixed, *words)
    with model.as_folder(max(load.prompt_tokens + load.new_tokens for load in loads)) as folder:
        spec = ServerSpec(folder, {"--lim-budget": f"{budget}"}, words)
        ours, console = server_options(spec, port=free_port()), Console(stderr=True)
        for policy in policies:
            own = ours.lim_flags if policy == BACKEND else ()
            options = replace(ours, port=free_port(), backend=policy, lim_flags=own)
            yield running_server(options, console, title=policy, verbose=verbose)


def measure(
    servers: Iterable[AbstractContextManager[Any]], loads: Sequence[Load], api_key: str | None
) -> Iterator[tuple[ServeRow, dict[str, Any]]]:
    """Check the kernels, and yield the rows of each server with their conditions."""
    servers = iter(servers)
    first = next(servers)  # bad options are refused before the kernels are checked
    # In a process of its own: the GPU's memory belongs to the server.
    run_in_child(require_exact_kernels)
    conditions = surroundings() | {"kernels_exact": True, "notes": list(NOTES)}
    dense: dict[Load, list[Times]] = {load: [] for load in loads}
    for running in chain((first,), servers):
        with running as server, local_client(server.url, api_key, 2 * FLUSH_S) as http:
            for load in loads:
                row, facts = measure_load(http, load, dense[load])
                yield row, conditions | facts


def measure_load(
    http: httpx.Client, load: Load, dense: list[Times]
) -> tuple[ServeRow, dict[str, Any]]:
    """Run one load on an idle server; returns the row and the server's properties."""
    try:
        http.post(f"/flush_cache?timeout={FLUSH_S:g}").raise_for_status()  # waits until idle
        info = http.get("/server_info").raise_for_status().json()
        outputs = asyncio.run(generate(http, load))
        after = lim_state(http.get("/server_info").raise_for_status().json())
    except httpx.HTTPStatusError as error:
        hint = "give its key by --api-key" if error.response.status_code == 401 else "is it busy?"
        raise ServerError(f"{http.base_url} refuses: {error.response.text[:200]}; {hint}") from None
    except httpx.HTTPError as error:
        raise ServerError(f"no server answers at {http.base_url}: {error}") from None
    before, counted = lim_state(info), None
    if before and after:
        sparse_rows = after["sparse_rows"] - before["sparse_rows"]
        counted = sparse_rows, after["retractions"] - before["retractions"]
        check_sparse(load, outputs, before, *counted)
    policy = BACKEND if before else str(decode_backend(info))
    kv_capacity = info["internal_states"][0]["memory_usage"]["token_capacity"]
    row = make_row(policy, load, outputs, kv_capacity, counted, dense)
    return row, {
        **asdict(load),
        "server": {name: info.get(name) for name in FACTS.split()},
        "model_path": info["model_path"],
        "sglang_version": info.get("version"),
        "kv_capacity": kv_capacity,
        "lim_config": before and before["config"],
        "roles": before and before["roles"],
    }


async def generate(http: httpx.Client, load: Load) -> list[Any]:
    """Send all requests at once by SGLang's benchmark client; returns an output per request."""
    from sglang.benchmark import serving

    key = http.headers.get("authorization")
    # The arguments of `python -m sglang.benchmark.serving` that its request function reads.
    arguments = Namespace(
        header=[f"Authorization={key}"] if key else None,
        temperature=0.0,
        top_p=1.0,
        disable_ignore_eos=False,
        disable_stream=False,
        return_logprob=False,
        return_routed_experts=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
    )
    serving.set_global_args(arguments)
    sampling: dict[str, Any] = {"max_new_tokens": load.new_tokens, "ignore_eos": True}
    sampling |= {"temperature": load.temperature, "top_p": load.top_p}
    # The client counts only events with text.
    sampling |= {"skip_special_tokens": False, "stream_interval": load.stream_interval}
    random = np.random.default_rng([load.seed, load.concurrency])
    requests = [
        serving.RequestFuncInput(
            prompt=random.integers(VOCABULARY, size=load.prompt_tokens).tolist(),
            api_url=str(http.base_url.join("/generate")),
            prompt_len=load.prompt_tokens,
            output_len=load.new_tokens,
            model="",
            lora_name="",
            image_data=None,
            extra_request_body={"sampling_params": sampling},
        )
        for _ in range(load.concurrency)
    ]
    running = asyncio.gather(*map(serving.async_request_sglang_generate, requests))
    ended, _ = await asyncio.wait([running], timeout=load.limit_s)
    if not ended:
        http.post("/abort_request", json={"abort_all": True}).raise_for_status()
    outputs: list[Any] = await running
    # The last event of a stream may have no text.
    enough = load.new_tokens - load.stream_interval if ended else 0
    for output in outputs:
        if not output.success or output.output_len < enough:
            raise ServerError(
                f"a request ended after {output.output_len} of {load.new_tokens} tokens: see the "
                f"server's log {output.error.strip()[-300:]}".rstrip()
            )
    return outputs


def check_sparse(
    load: Load, outputs: Sequence[Any], state: Mapping[str, Any], sparse_rows: int, retractions: int
) -> None:
    """Refuse a run of our server that decoded densely beyond the budget."""
    if "reuse" not in state["roles"]:
        return
    budget = state["config"]["budget"]
    # Prefill gives the first token, and the next one after a retraction.
    decoded = [output.output_len - 1 for output in outputs if output.ttft]
    expected = sum(max(min(n, load.prompt_tokens + n - budget), 0) for n in decoded) - retractions
    if sparse_rows < expected:
        raise LimError(
            f"no time is shown: {load.concurrency} requests decoded {expected:,} tokens beyond the "
            f"budget of {budget:,}, but the server counted {sparse_rows:,} sparse rows"
        )
