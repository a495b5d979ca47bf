"""DeepConf's confidence of a chain, and the threshold that its warm-up sets."""

import math
import random

import numpy as np
import pytest

from lim_sglang.programs.stopping import GroupConfidence, confidence_threshold


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_group_confidence_is_the_mean_of_the_last_window(window: int) -> None:
    rng = random.Random(window)
    tokens = [rng.uniform(0, 20) for _ in range(500)]
    group, lowest = GroupConfidence(window), math.inf
    assert group.lowest is None
    for count, token in enumerate(tokens, 1):
        now = group.push(token)
        if count < window:
            assert now is None
            assert group.lowest == pytest.approx(sum(tokens[:count]) / count)
        else:
            mean = sum(tokens[count - window : count]) / window
            lowest = min(lowest, mean)
            assert now == pytest.approx(mean, rel=1e-12)
            assert group.lowest == pytest.approx(lowest, rel=1e-12)


def test_a_rounding_error_does_not_outlive_its_window() -> None:
    group = GroupConfidence(100)
    for token in (1e15, *(0.1 for _ in range(250))):
        now = group.push(token)
    assert now == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 16, 17])
def test_the_threshold_is_the_percentile_of_the_warm_up(keep: float, count: int) -> None:
    rng = random.Random(count)
    lowest = [rng.uniform(5, 25) for _ in range(count)]
    threshold = confidence_threshold(lowest, keep)
    assert threshold == pytest.approx(np.percentile(lowest, 100 - 100 * keep))
    kept = sum(confidence >= threshold for confidence in lowest)
    assert abs(kept - keep * count) <= 1
