"""What a benchmark measures: batches by contexts, backends, repetitions. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from lim_sglang.errors import ConfigError
from lim_sglang.refusals import BACKEND

DENSE_BACKENDS = ("flashinfer", "triton", "fa3")
"""SGLang's own backends that can be measured beside ours."""


@dataclass(frozen=True, order=True)
class Point:
    """One place of the table: so many requests with so many tokens each, the newest included."""

    batch: int
    context: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.context < 1:
            raise ConfigError(f"a point needs a batch and a context of at least 1, not {self}")

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `8x32768` or `8x32k`; k stands for 1,024 tokens."""
        found = re.fullmatch(r"(\d+)[xX](\d+)([kK]?)", text.strip())
        if not found:
            raise ConfigError(f"a point is BATCHxCONTEXT such as 8x32768 or 8x32k, not {text!r}")
        return cls(int(found[1]), int(found[2]) * (1024 if found[3] else 1))

    @property
    def num_tokens(self) -> int:
        """Slots of the KV cache that the point fills."""
        return self.batch * self.context


def choose_points(
    texts: Sequence[str], batch: int | None, context: int | None
) -> tuple[Point, ...]:
    """The points of the command line: those of --point, then --batch with --context."""
    points = [Point.parse(text) for text in texts]
    if (batch is None) != (context is None):
        raise ConfigError("--batch and --context belong together: give both or neither")
    if batch is not None and context is not None:
        points.append(Point(batch, context))
    if not points:
        raise ConfigError("name at least one point: --point 8x32768, or --batch 8 --context 32768")
    return tuple(dict.fromkeys(points))


def choose_backends(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of attention backends that starts with ours."""
    names = read_backends(text)
    if BACKEND not in names:
        raise ConfigError(f"--backends must name {BACKEND}: it is what is measured")
    return (BACKEND, *(name for name in names if name != BACKEND))


def read_backends(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of attention backends, ours or others, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = (BACKEND, *DENSE_BACKENDS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"unknown backend {', '.join(unknown)}; known: {', '.join(known)}")
    return names


@dataclass(frozen=True)
class Repeats:
    """How often a point is timed; a window is one number of the median."""

    windows: int = 7
    steps: int = 20
    """Decode steps in one window."""

    def __post_init__(self) -> None:
        if self.windows < 1 or self.steps < 1:
            raise ConfigError(f"--windows and --steps must be at least 1, not {self}")


@dataclass(frozen=True)
class ModelChoice:
    """What is measured: a published shape with dummy weights, or a model folder."""

    shape: str | None
    folder: str | None

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.folder is None):
            raise ConfigError("name what to measure: either --shape qwen3-8b or --model FOLDER")

    @property
    def name(self) -> str:
        """As it is shown and recorded."""
        return self.shape or self.folder or ""


@dataclass(frozen=True)
class DecodeOptions:
    """Everything that `lim bench decode` was asked for."""

    model: ModelChoice
    points: tuple[Point, ...]
    backends: tuple[str, ...]
    repeats: Repeats
    budget: int
    mem_fraction_static: float
    split: bool = True
    """Whether the step is also divided into its parts."""
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return max(point.context for point in self.points)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batches that CUDA graphs are captured for."""
        return tuple(sorted({point.batch for point in self.points}))
