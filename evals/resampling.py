"""95 % intervals and an exact test from what independent questions show, pure.

Questions are resampled whole, with all their samples: samples of one question are not independent.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
FEW = 10
"""Questions of which at least so many have to differ before their spread speaks for all others."""
BLOCK = 2_000_000
"""Drawn questions that are held at once: 16 MB."""


def mean_interval(values: Sequence[float], *, seed: int, resamples: int) -> tuple[float, float]:
    """Where the mean of all questions lies, by the percentiles of resampled means.

    Their distance from the mean is widened by t / z · sqrt(n / (n - 1)), since bare percentiles are
    too close for few questions. Where fewer than `FEW` questions differ, others that would were
    hardly seen, and resampling what was seen is blind to them: two made-up questions, as far to
    either side as the furthest that was seen, stand in for these, after Bonett and Price (2012,
    Journal of Educational and Behavioral Statistics 37, 479-488), who do so with pairs of verdicts.

    `tests/unit/test_evals_statistics.py` measures how often the truth is inside.

    Args:
        values: what is different in each question, from -1 to 1.
    """
    import numpy as np

    seen = np.asarray(values, float)
    if np.count_nonzero(seen) < FEW:
        furthest = float(np.abs(seen).max()) or 1.0
        seen = np.append(seen, [furthest, -furthest])
    drawn = resampled_means(seen[:, None], seed=seed, resamples=resamples)[:, 0]
    low, high = _widened(drawn, float(seen.mean()), len(seen))
    return max(-1.0, low), min(1.0, high)


def ratio_interval(
    a: Sequence[float], b: Sequence[float], *, seed: int, resamples: int
) -> tuple[float, float]:
    """Where the ratio of the means, b / a, lies: as above, on a logarithmic scale.

    Studentised resamples cover no better where lengths are as skewed as those of samples.

    Args:
        a: of each question, above zero.
        b: of the same questions, likewise.
    """
    import numpy as np

    pairs = np.column_stack([a, b]).astype(float)
    drawn = np.log(resampled_means(pairs, seed=seed, resamples=resamples))
    mean_a, mean_b = np.log(pairs.mean(axis=0))
    low, high = _widened(drawn[:, 1] - drawn[:, 0], float(mean_b - mean_a), len(pairs))
    return math.exp(low), math.exp(high)


def resampled_means(values: "NDArray[Any]", *, seed: int, resamples: int) -> "NDArray[Any]":
    """Means over as many questions as there are, drawn with replacement.

    Args:
        values: [questions, columns].

    Returns:
        [resamples, columns].
    """
    import numpy as np

    n, columns = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, columns))
    block = max(1, BLOCK // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(0, n, size=(size, n))
        for column in range(columns):
            means[start : start + size, column] = values[:, column][drawn].mean(axis=1)
    return means


def _widened(drawn: "NDArray[Any]", value: float, n: int) -> tuple[float, float]:
    """The middle `LEVEL` of what was drawn from n questions, further from the value."""
    import numpy as np
    from scipy.special import stdtrit

    two_sided = (1 + LEVEL) / 2
    t = stdtrit(n - 1, two_sided)  # of Student's distribution with n - 1 degrees of freedom
    widen = t / NormalDist().inv_cdf(two_sided) * math.sqrt(n / (n - 1))
    low, high = np.quantile(drawn, [1 - two_sided, two_sided])
    return float(value + (low - value) * widen), float(value + (high - value) * widen)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """How likely counts as uneven as these are where neither is favoured: McNemar's test (1947),
    two-sided and exact, by the binomial distribution.

    At most a share p of runs without a difference has a p-value up to p.
    """
    count, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(count, n) for n in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)
