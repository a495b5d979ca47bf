"""`lim bench serve`: one server a policy, one after the other, under the same loads."""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from lim_sglang.bench.apart import run_apart
from lim_sglang.bench.driver import Glance, Run, drive
from lim_sglang.bench.facts import model_folder, surroundings
from lim_sglang.bench.gate import check_exactness, require_gpu
from lim_sglang.bench.load import Load, ServeOptions
from lim_sglang.bench.profiled import record
from lim_sglang.bench.progress import Progress
from lim_sglang.bench.serve_facts import server_facts, vocabulary
from lim_sglang.bench.serve_rows import ServeRow, make_row, one_line, timeline_line
from lim_sglang.bench.streams import Curve
from lim_sglang.bench.timeline import Steps, cut_strip, recorded_steps, summarise
from lim_sglang.errors import LimError, ServerError
from lim_sglang.programs.http_client import Client
from lim_sglang.server import Server, ServerOptions, decode_backend, free_port, lim_state
from lim_sglang.validation import BACKEND

NOTES = (
    "measured by the client over HTTP, from the last first token of the requests that began "
    "together to the last token of all",
    "each stream's first chunk is prefill's and not counted",
    "the tokens of one chunk share the time since the chunk before evenly",
    "no request replaces one that has ended",
    "the speed-up is of the seconds for as many tokens as both policies decoded",
)
"""What a reader of the numbers has to know."""
TIMELINE_NOTES = (
    "the timeline is of a run of its own after the timed ones, with half of the new tokens in the "
    "prompts",
    "the profiler makes launches and kernels slower, so its gaps are upper bounds",
)

FLUSH_S = 60.0
"""How long a server may take to end what ran before."""
LOG_TAIL = 2000
"""Characters of a failed server's log that are shown."""

Measured = tuple[ServeRow, dict[str, Any]]
"""A row and what it depends on."""


def measure(options: ServeOptions, report: Progress) -> Iterator[Measured]:
    """The rows as they are measured, dense policies first, with their conditions."""
    report.doing("Are the kernels exact on this GPU?")
    made_by = run_apart("the check of this GPU", checked_surroundings)
    curves: dict[Load, list[Curve]] = {load: [] for load in options.loads}
    asked = {
        "model": options.model.name,
        "dummy_weights": options.model.shape is not None,
        "sglang_options": list(options.sglang_options),
    }
    with model_folder(options.model, options.context) as folder:
        for policy in options.policies:
            report.doing(f"Starting a server with {policy}")
            with started(options, policy, folder) as server, Client(server.url) as client:
                for row, facts in measure_loads(client, curves, report, steps=options.timeline):
                    yield row, made_by | asked | facts


def measure_running(
    client: Client,
    loads: Sequence[Load],
    report: Progress,
    api_key: str | None,
    *,
    steps: int = 0,
) -> Iterator[Measured]:
    """The rows of a server on this machine that someone else has started."""
    report.doing("Are the kernels exact on this GPU?")
    made_by = run_apart("the check of this GPU", checked_surroundings)
    curves: dict[Load, list[Curve]] = {load: [] for load in loads}
    for row, facts in measure_loads(client, curves, report, steps=steps, api_key=api_key):
        yield row, made_by | facts


def measure_loads(
    client: Client,
    curves: Mapping[Load, list[Curve]],
    report: Progress,
    *,
    steps: int = 0,
    api_key: str | None = None,
) -> Iterator[Measured]:
    """The rows of one server. It is profiled when all its timed runs are over, because CUPTI stays
    attached; until then they are held back, and given without a timeline where a run fails.

    Args:
        curves: of dense policies by load; this server's join them if it is dense.
        steps: to be profiled under each load.
    """
    held: deque[tuple[Load, ServeRow, dict[str, Any]]] = deque()
    try:
        for load, dense in curves.items():
            row, curve, facts = measure_load(client, load, dense, report, api_key)
            if row.policy != BACKEND:
                dense.append(curve)
            if steps:
                held.append((load, row, facts))
            else:
                yield row, facts
        while held:
            found = add_timeline(client, *held[0], steps, report, api_key)
            held.popleft()
            yield found
    except (LimError, KeyboardInterrupt):
        yield from ((row, facts) for _, row, facts in held)
        raise


def add_timeline(
    client: Client,
    load: Load,
    row: ServeRow,
    facts: dict[str, Any],
    steps: int,
    report: Progress,
    api_key: str | None = None,
) -> Measured:
    """A timed row with what a profiled run under its load shows, or why that shows nothing."""
    report.doing(f"{row.policy}, {row.concurrency} requests: profiling {steps} decode steps")
    try:
        if facts["server"]["device"] == "cpu":
            raise ServerError("the server decodes on a CPU, and SGLang's dies of a GPU's profile")
        empty(client)
        half_way = load.half_way(recorded_steps(steps), facts["kv_capacity"])
        vocab_size = vocabulary(facts["model_path"])
        trace = record(client, half_way, vocab_size, steps, api_key=api_key)
        found = Steps.of(trace, steps)
        row = replace(row, timeline=summarise(found), strip=cut_strip(found))
    except (LimError, OSError) as error:
        report.done(f"{row.policy}, {row.concurrency} requests: no timeline: {error}")
        return replace(row, timeline_error=str(error)), facts
    report.done(str(timeline_line(row)))
    notes = [*facts["notes"], *TIMELINE_NOTES]
    return row, facts | {"notes": notes, "timeline_load": asdict(half_way)}


def checked_surroundings() -> dict[str, Any]:
    """What every row depends on, once the kernels are exact. In a process of its own: the GPU's
    memory belongs to the server."""
    require_gpu()
    check_exactness()
    return surroundings() | {"kernels_exact": True}  # or check_exactness would have refused


@contextmanager
def started(options: ServeOptions, policy: str, folder: str) -> Iterator[Server]:
    """A server of one policy that is ready and proved to decode by it; ended with the block.

    Raises:
        ServerError: it did not start, or broke down later; the end of its log comes with it.
    """
    server_options = ServerOptions(
        folder,
        port=free_port(),
        on_cpu=False,
        backend=policy,
        lim_flags=options.lim_flags(policy),
        sglang_options=options.server_options,
    )
    with tempfile.TemporaryFile() as log:
        try:
            with Server(server_options, log=None if options.verbose else log.fileno()) as server:
                yield server
        except ServerError as error:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-LOG_TAIL:]
            raise ServerError(f"{error}\n{tail}".rstrip()) from None


def measure_load(
    client: Client,
    load: Load,
    dense: Sequence[Curve],
    report: Progress,
    api_key: str | None = None,
) -> tuple[ServeRow, Curve, dict[str, Any]]:
    """Drive an idle server once; its row, its curve, and what it is.

    Args:
        dense: curves of dense policies under this load.

    Raises:
        LimError: a request failed, or our server decoded densely what it should not.
    """
    empty(client)
    before = client.get("/server_info")
    policy = BACKEND if lim_state(before) is not None else str(decode_backend(before))
    facts = server_facts(before) | asdict(load) | {"notes": list(NOTES)}
    what = f"{policy}, {load.concurrency} requests"
    report.doing(f"{what}: waiting for the first token")
    vocab_size = vocabulary(before["model_path"])
    watch = watcher(what, load, report)
    run = drive(client.url, load, vocab_size, api_key=api_key, watch=watch)
    sparse_rows = counted_rows(before, client.get("/server_info"))
    check_sparse(load, run, facts, sparse_rows)
    row, curve = make_row(policy, load, run, dense=dense, sparse_rows=sparse_rows)
    report.done(one_line(row))
    return row, curve, facts


def empty(client: Client) -> None:
    """Wait until nothing runs in the server, and forget every prefix.

    Raises:
        ServerError: it stays busy.
    """
    path = f"/flush_cache?timeout={FLUSH_S:g}"
    try:
        client.start(client.send("POST", path, timeout_s=2 * FLUSH_S)).result()
    except ServerError as error:
        raise ServerError(f"the server has to be idle before it is measured: {error}") from None


def counted_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> int | None:
    """Sparse rows of a run by our server's count; None for a dense server."""
    first, last = lim_state(before), lim_state(after)
    return last["sparse_rows"] - first["sparse_rows"] if first and last else None


def check_sparse(load: Load, run: Run, facts: Mapping[str, Any], sparse_rows: int | None) -> None:
    """Refuse a time of LessIsMore in which it had to be sparse and was not."""
    if sparse_rows is None or "reuse" not in facts["roles"]:
        return
    budget = facts["lim_config"]["budget"]
    # Prefill gives the first token, and the next one after a retraction.
    expected = sum(
        max(min(stream.num_tokens - 1, load.prompt_tokens + stream.num_tokens - 1 - budget), 0)
        - stream.retractions
        for stream in run.streams
    )
    if sparse_rows < expected:
        raise LimError(
            f"no time is shown: {load.concurrency} requests decoded {expected:,} tokens beyond the "
            f"budget of {budget:,}, but the server counted {sparse_rows:,} sparse rows"
        )


def watcher(what: str, load: Load, report: Progress) -> Callable[[Glance], None]:
    """Shows a run while it goes on."""
    total = load.concurrency * load.new_tokens

    def watch(glance: Glance) -> None:
        if not glance.seconds:
            return
        parts = [f"{what}: {glance.num_tokens / glance.seconds:,.0f} tokens/s"]
        if glance.last:
            parts.append(f"KV cache {100 * glance.last.kv_share:.0f} %")
            parts.append(f"{glance.last.running} running, {glance.last.waiting} waiting")
        share = glance.num_tokens / total
        if load.limit_s:
            share = max(share, min(glance.seconds / load.limit_s, 1.0))
        report.advancing(share, ", ".join(parts))

    return watch
