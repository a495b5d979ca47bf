"""Rows as `lim bench decode --out` writes them."""

import json
from pathlib import Path
from typing import Any

from lim_sglang.bench.points import Point
from lim_sglang.bench.recorded import Recorded, read_recorded

CONDITIONS: dict[str, Any] = {
    "date": "2026-11-24T19:09:16+00:00",
    "commit": "c0ffee0123456789abcdef",
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.95",
    "versions": {
        "torch": "2.11.0",
        "triton": "3.6.0",
        "flashinfer-python": "0.6.14",
        "sglang": "0.5.16",
    },
    "model": "qwen3-8b",
    "dummy_weights": True,
    "lim_config": {"policy": "lessismore", "budget": 2048},
    "budget": 2048,
    "roles": ["full", "select", "reuse", "reuse"],
    "kv_dtype": "torch.bfloat16",
    "copy_gb_per_s": 3000.0,
    "weight_bytes_read": 15_000_000_000,
    "kv_bytes_per_token_and_layer": 4096,
    "windows": 7,
    "steps": 20,
}


def line(
    backend: str, point: str = "8x32k", step_ms: float = 10.0, share: float = 0.8, **changed: Any
) -> dict[str, Any]:
    """One row as `lim bench decode --out` writes it, as far as it is read."""
    where = Point.parse(point)
    return {
        "point": str(where),
        "batch": where.batch,
        "context": None if where.is_mixed else where.longest,
        "backend": backend,
        "step_ms": {"median": step_ms, "low": step_ms, "high": step_ms},
        "limit_share": share,
        "conditions": CONDITIONS | changed,
    }


def write(folder: Path, *lines: Any, name: str = "decode.jsonl") -> Path:
    """A file of recorded lines."""
    path = folder / name
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return path


def recorded(folder: Path, *lines: Any) -> Recorded:
    """What is read of them."""
    return read_recorded([write(folder, *lines)])


ROWS = (
    line("lim", "8x32k", 10.0, 0.75),
    line("flashinfer", "8x32k", 20.0, 0.9),
    line("lim", "1x32k", 7.0),
    line("flashinfer", "1x32k", 8.4),
    line("fa3", "8x32k", 19.0, 1.2),
    line("lim", "8x1500", 7.5),
)
