"""Rows as `lim bench decode --out` records them."""

import json
from pathlib import Path
from typing import Any

from lim_sglang.bench.results import DecodeTable, Row, StepSplit, read_tables
from lim_sglang.bench.workloads import Point
from lim_sglang.kernels.bench import Spread

CONDITIONS: dict[str, Any] = {
    "date": "2026-11-24T19:09:16+00:00",
    "commit": "c0ffee0123456789abcdef",
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.95",
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "sglang": "0.5.16"},
    "model": "qwen3-8b",
    "dummy_weights": True,
    "lim_config": {"policy": "lessismore", "budget": 2048},
    "budget": 2048,
    "roles": ["full", "select", "reuse", "reuse"],
    "kv_dtype": "torch.bfloat16",
    "quantization": "none",
    "context_length": 40960,
    "tp": 1,
    "copy_gb_per_s": 3000.0,
    "weight_bytes_read": 15_000_000_000,
    "kv_bytes_per_token_and_layer": 4096,
    "windows": 7,
    "steps": 20,
    "notes": ["no prefill"],
}


def row(backend: str, point: str = "8x32k", step_ms: float = 10.0, share: float = 0.8) -> Row:
    """Return a measured row."""
    return Row(
        point=Point.parse(point),
        backend=backend,
        step_ms=Spread(step_ms, step_ms - 0.1, step_ms + 0.2),
        replay_ms=Spread(step_ms - 0.3, 0.0, 0.0),
        sparse_rows=8 if backend == "lim" else None,
        num_bytes=10**10,
        limit_share=share,
        kernel_launches=518,
        split=StepSplit(1.5, 0.25, 1.0, 7.25) if backend == "lim" else None,
    )


def line(
    backend: str, point: str = "8x32k", step_ms: float = 10.0, share: float = 0.8, **changed: Any
) -> Any:
    """Return a recorded line as an object, with other conditions."""
    return json.loads(row(backend, point, step_ms, share).to_json(CONDITIONS | changed))


def write(folder: Path, *lines: Any, name: str = "decode.jsonl") -> Path:
    """Write a file of recorded lines."""
    path = folder / name
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return path


def table(folder: Path, *lines: Any) -> DecodeTable:
    """Write recorded lines and read the one table that they make."""
    (found,) = read_tables([write(folder, *lines)])
    return found


LINES = (
    line("lim", "8x32k", 10.0, 0.75),
    line("flashinfer", "8x32k", 20.0, 0.9),
    line("lim", "1x32k", 7.0),
    line("flashinfer", "1x32k", 8.4),
    line("fa3", "8x32k", 19.0, 1.2),
    line("lim", "8x1500", 7.5),
)
