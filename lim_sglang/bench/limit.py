"""What a decode step must read at least, and how its time divides. Pure arithmetic.

The limit of a step is bytes over copy bandwidth: all weights once, and of the KV cache what the
roles say. What selection itself reads and writes is left out, so the limit is a lower bound.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lim_sglang.bench.points import Point
from lim_sglang.config import Role

EMBEDDING = "embed_tokens.weight"
OUTPUT_MATRIX = "lm_head.weight"


@dataclass(frozen=True)
class Traffic:
    """What of a model is read in a step."""

    weight_bytes: int
    token_bytes: int
    """K and V of one token in one layer."""
    roles: tuple[Role, ...]

    def dense_bytes(self, point: Point) -> int:
        """A step whose every layer reads everything."""
        return self.weight_bytes + point.num_tokens * self.token_bytes * len(self.roles)

    def lim_bytes(self, point: Point, budget: int) -> int:
        """A step whose REUSE layers read at most `budget` tokens a request."""
        reuse = Counter(self.roles)[Role.REUSE]
        whole = len(self.roles) - reuse
        kept = sum(min(length, budget) for length in point.lengths)
        return self.weight_bytes + self.token_bytes * (point.num_tokens * whole + kept * reuse)


def share_of_limit(num_bytes: int, gb_per_s: float, step_ms: float) -> float:
    """The time that the bytes alone would take, as a share of the step's."""
    return num_bytes / (gb_per_s * 1e9) / (step_ms / 1e3)


def read_weight_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of the weights that a step reads, from the size in bytes of each parameter.

    Of an embedding, a step reads a row a request, which is left out; unless the model has no
    output matrix besides, and the embedding is read whole as one.
    """
    tied = not any(name.endswith(OUTPUT_MATRIX) for name in sizes)
    return sum(size for name, size in sizes.items() if tied or not name.endswith(EMBEDDING))


@dataclass(frozen=True)
class StepSplit:
    """Where the time of one step goes, in milliseconds."""

    dense_ms: float
    """Dense attention of FULL and SELECT layers."""
    selection_ms: float
    """All that SELECT layers do beyond dense attention."""
    sparse_ms: float
    """Attention of REUSE layers."""
    rest_ms: float
    """Everything else: matrices, norms, cache writes, launches, planning on the host."""


def split_step(step_ms: float, roles: Sequence[Role], layer_ms: Mapping[Role, float]) -> StepSplit:
    """Divide a step by what one layer of each role takes.

    Args:
        layer_ms: milliseconds of attention in one layer of a role. Without a FULL layer in the
            model, SELECT layers count as dense whole.
    """
    count = Counter(roles)
    select_ms = layer_ms.get(Role.SELECT, 0.0)
    full_ms = layer_ms.get(Role.FULL, select_ms)
    dense_ms = (count[Role.FULL] + count[Role.SELECT]) * full_ms
    selection_ms = count[Role.SELECT] * (select_ms - full_ms) if count[Role.SELECT] else 0.0
    sparse_ms = count[Role.REUSE] * layer_ms.get(Role.REUSE, 0.0)
    rest_ms = step_ms - dense_ms - selection_ms - sparse_ms
    return StepSplit(dense_ms, selection_ms, sparse_ms, rest_ms)
