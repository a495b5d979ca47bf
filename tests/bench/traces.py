"""Chrome traces of decode steps, as torch's profiler writes them."""

import json
from typing import Any

KERNELS = 10
"""Of a replay."""
THREAD, OTHER_THREAD = 4242, 4343


def event(
    category: str, start_us: float, length_us: float, correlation: int, **fields: Any
) -> dict[str, Any]:
    """One complete event."""
    return {
        "ph": "X",
        "cat": category,
        "name": "kernel",
        "pid": 0,
        "tid": 7,
        "ts": start_us,
        "dur": length_us,
        "args": {"stream": 7, "correlation": correlation},
    } | fields


def call(name: str, start_us: float, length_us: float, correlation: int = 0) -> dict[str, Any]:
    """One call of the thread that launches."""
    return event("cuda_runtime", start_us, length_us, correlation, name=name, tid=THREAD)


def step(number: int, start_us: float, *, between_us: float = 20.0) -> list[dict[str, Any]]:
    """One step of 1,000 us: a replay without gaps, sampling, and a copy on another stream.

    From the replay's end at 900 us nothing runs for `between_us`; then sampling takes what is left.
    The host launched the replay 500 us before it began.
    """
    graph, sampling, copy = (10 * number + n for n in (1, 2, 3))
    length_us = 900.0 / KERNELS
    end_us = start_us + 900.0
    return [
        *(event("kernel", start_us + n * length_us, length_us, graph) for n in range(KERNELS)),
        event("kernel", end_us + between_us, 100.0 - between_us, sampling),
        event("gpu_memcpy", start_us + 300.0, 5.0, copy, tid=20),
        call("cudaGraphLaunch", start_us - 600.0, 100.0, graph),
        call("cudaLaunchKernel", start_us - 450.0, 5.0, sampling),
        call("cudaMemcpyAsync", start_us - 420.0, 5.0, copy),
        call("cudaEventSynchronize", start_us - 380.0, 300.0),
    ]


def steps(count: int, start_us: float = 1e9, **fields: Any) -> list[dict[str, Any]]:
    """Consecutive steps."""
    return [each for n in range(count) for each in step(n, start_us + 1000.0 * n, **fields)]


def text(events: list[dict[str, Any]]) -> str:
    """A whole file, with what else such a file holds."""
    others = [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "ts": 0, "args": {"name": "x"}},
        {"ph": "s", "id": 1, "pid": 0, "tid": 7, "ts": 1e9, "cat": "ac2g", "name": "ac2g"},
        event("overhead", 1e9, 9e9, 0, name="Buffer Flush", tid=OTHER_THREAD),
    ]
    return json.dumps({"schemaVersion": 1, "traceEvents": [*others, *events]})
