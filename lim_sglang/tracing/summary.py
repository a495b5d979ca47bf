"""Means and curves of a trace's records."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import fmean

from lim_sglang.tracing.records import LayerRecord, Trace

Curve = list[tuple[int, float]]
"""Pairs of a decode step, or a layer, and a value, ascending."""
Value = Callable[[LayerRecord], float | None]
"""Takes a value out of a record; None where the record has none."""
CRITERION = 0.3
"""Mean Jaccard index of the heads' own sets below which they are said to share too little for one
set: the criterion of experiment C1."""


def percent(measure: str, policy: str) -> Value:
    """Return what takes a policy's `recall`, `from_step` or `from_layer` out of a record."""

    def value(record: LayerRecord) -> float | None:
        shares: Mapping[str, float] = getattr(record, measure)
        return 100 * shares[policy] if policy in shares else None

    return value


def shared_layers(trace: Trace) -> set[int]:
    """Return the layers that all policies read sparsely, in which alone recall compares."""
    policies = trace.conditions["policies"].keys()
    records = (record for question in trace.questions for record in question.layers)
    return {record.layer for record in records if record.recall.keys() >= policies}


def mean_curve(records: Iterable[LayerRecord], x: str, value: Value) -> Curve:
    """Return the mean value at each decode step or layer.

    Args:
        x: `step` or `layer`.
    """
    found: dict[int, list[float]] = defaultdict(list)
    for record in records:
        y = value(record)
        if y is not None:
            found[getattr(record, x)].append(y)
    return [(at, fmean(found[at])) for at in sorted(found)]


def cumulative(curve: Curve) -> Curve:
    """Return the mean of all values up to each point."""
    return running(curve, len(curve))


def running(curve: Curve, window: int) -> Curve:
    """Return the mean of the newest `window` values at each point, of fewer at the beginning."""
    values = [y for _, y in curve]
    return [(x, fmean(values[max(0, n + 1 - window) : n + 1])) for n, (x, _) in enumerate(curve)]


def means_of_questions(
    trace: Trace, value: Value, layers: Collection[int] | None = None
) -> list[float]:
    """Return each question's mean over its steps and layers; a question without values has none.

    Args:
        layers: those that count; None for all.
    """
    means = []
    for question in trace.questions:
        records = (r for r in question.layers if layers is None or r.layer in layers)
        found = [value(record) for record in records]
        if values := [each for each in found if each is not None]:
            means.append(fmean(values))
    return means
