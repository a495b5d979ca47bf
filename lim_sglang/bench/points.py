"""What a benchmark measures: batches by contexts, backends, repetitions. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

from lim_sglang.errors import ConfigError
from lim_sglang.validation import BACKEND

DENSE_BACKENDS = ("flashinfer", "triton", "fa3")
"""SGLang's own backends that can be measured beside ours."""
CACHE_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2")
"""What a KV cache may hold; `auto` is the model's dtype, or what its checkpoint says."""
QUANTIZATIONS = ("none", "fp8")
"""How SGLang may quantize weights while it loads them; a checkpoint's own stays with `none`."""


@dataclass(frozen=True)
class Point:
    """One place of the table: the requests of a batch, each with so many tokens."""

    lengths: tuple[int, ...]
    """Tokens of each request, the newest included, in the order of the batch's rows."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(
                f"a point needs requests of at least 1 token each, not {list(self.lengths)}"
            )

    def __str__(self) -> str:
        return "+".join(f"{batch}x{context}" for batch, context in self.groups)

    @classmethod
    def uniform(cls, batch: int, context: int) -> Self:
        """So many requests with so many tokens each."""
        if batch < 1 or context < 1:
            raise ConfigError(
                f"a point needs a batch and a context of at least 1, not {batch}x{context}"
            )
        return cls((context,) * batch)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `8x32768`, `8x32k` or a mixed batch such as `4x32k+4x1k`; k is 1,024 tokens."""
        lengths: list[int] = []
        for part in text.split("+"):
            found = re.fullmatch(r"(\d+)[xX](\d+)([kK]?)", part.strip())
            if not found:
                raise ConfigError(
                    "a point is BATCHxCONTEXT such as 8x32768 or 8x32k, or several joined by + "
                    f"such as 4x32k+4x1k, not {text!r}"
                )
            group = cls.uniform(int(found[1]), int(found[2]) * (1024 if found[3] else 1))
            lengths += group.lengths
        return cls(tuple(lengths))

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Neighbours of one length as (batch, context), in order; one group unless it is mixed."""
        return tuple((len(list(rows)), length) for length, rows in groupby(self.lengths))

    @property
    def batch(self) -> int:
        """Requests."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(self.lengths)

    @property
    def is_mixed(self) -> bool:
        """Whether requests differ in length, so that there is no one context."""
        return min(self.lengths) < self.longest

    @property
    def num_tokens(self) -> int:
        """Slots of the KV cache that the point fills."""
        return sum(self.lengths)

    def rows_over(self, budget: int) -> tuple[int, ...]:
        """Rows with more tokens than the budget: those that LessIsMore decodes sparsely."""
        return tuple(row for row, length in enumerate(self.lengths) if length > budget)


def choose_points(
    texts: Sequence[str], batch: int | None, context: int | None
) -> tuple[Point, ...]:
    """The points of the command line: those of --point, then --batch with --context."""
    points = [Point.parse(text) for text in texts]
    if (batch is None) != (context is None):
        raise ConfigError("--batch and --context belong together: give both or neither")
    if batch is not None and context is not None:
        points.append(Point.uniform(batch, context))
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
class Precision:
    """In which formats SGLang holds the KV cache and the weights, for all backends alike."""

    kv_cache_dtype: str = "auto"
    quantization: str = "none"

    def __post_init__(self) -> None:
        asked = (
            ("--kv-cache-dtype", self.kv_cache_dtype, CACHE_DTYPES),
            ("--quantization", self.quantization, QUANTIZATIONS),
        )
        reasons = [
            f"{option} {value} is not measured: use {', '.join(known)}"
            for option, value, known in asked
            if value not in known
        ]
        if reasons:
            raise ConfigError("; ".join(reasons))

    @property
    def server_args(self) -> Mapping[str, Any]:
        """The fields of SGLang's `ServerArgs`."""
        quantization = None if self.quantization == "none" else self.quantization
        return {"kv_cache_dtype": self.kv_cache_dtype, "quantization": quantization}

    def check_backends(self, names: Sequence[str]) -> None:
        """Refuse a backend that cannot read such a KV cache.

        SGLang would put Triton in the place of FlashAttention 3 without a word in the table.
        """
        if self.kv_cache_dtype == "fp8_e5m2" and "fa3" in names:
            raise ConfigError(
                "--backends fa3: FlashAttention 3 reads no KV cache of fp8_e5m2: leave fa3 out, "
                "or use --kv-cache-dtype fp8_e4m3"
            )

    def describe(self, model: str) -> str:
        """A model's name, with what is not its own format."""
        weights = "" if self.quantization == "none" else f", weights {self.quantization}"
        cache = "" if self.kv_cache_dtype == "auto" else f", KV cache {self.kv_cache_dtype}"
        return f"{model}{weights}{cache}"


@dataclass(frozen=True)
class DecodeOptions:
    """Everything that `lim bench decode` was asked for."""

    model: ModelChoice
    points: tuple[Point, ...]
    backends: tuple[str, ...]
    repeats: Repeats
    budget: int
    mem_fraction_static: float
    precision: Precision = Precision()
    split: bool = True
    """Whether the step is also divided into its parts."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.precision.check_backends(self.backends)

    @property
    def title(self) -> str:
        """What is measured, as it stands over the table."""
        return self.precision.describe(self.model.name)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(point.longest for point in self.points)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batches that CUDA graphs are captured for."""
        return tuple(sorted({point.batch for point in self.points}))
