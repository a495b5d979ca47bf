"""A debugging aid: the kept set of every sparse row, step and SELECT layer, as JSON lines."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

ENV_VAR = "LIM_TRACE"
"""Names a folder; each scheduler process then writes `kept-<pid>.jsonl` there. Slow."""


class Trace:
    """Appends one line a kept set."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"kept-{os.getpid()}.jsonl").open("a", buffering=1)

    @classmethod
    def from_environment(cls) -> Self | None:
        """The trace that `LIM_TRACE` asks for, None without it."""
        folder = os.environ.get(ENV_VAR)
        return cls(Path(folder)) if folder else None

    def record(self, step: int, rid: str, layer: int, seq_len: int, kept: Sequence[int]) -> None:
        """Write the ascending positions that one row keeps after one SELECT layer."""
        line = {"step": step, "rid": rid, "layer": layer, "seq_len": seq_len, "kept": list(kept)}
        self._file.write(json.dumps(line) + "\n")
