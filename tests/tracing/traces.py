"""Traces with numbers that can be checked by eye."""

from lim_sglang.tracing.records import LayerRecord, QuestionTrace, Trace

CONDITIONS = {
    "date": "2026-11-30T13:00:00+00:00",
    "commit": "0123456789abcdef",
    "gpu": None,
    "versions": {"torch": "2.11.0", "sglang": "0.5.16"},
    "model": "SmolLM2-135M-Instruct",
    "served": "lessismore",
    "policies": {"lessismore": {"budget": 64}, "streaming": {"budget": 64}},
    "budget": 64,
    "max_tokens": 100,
    "every": 8,
}


def record(
    step: int, layer: int, recall: dict[str, float], jaccard: float | None = 0.25
) -> LayerRecord:
    """Return a record of a model whose layer 2 selects."""
    from_step = {"lessismore": 0.75} if layer == 2 else {}
    ranked = None if jaccard is None else jaccard - 0.125
    return LayerRecord(step, 100 + step, layer, recall, from_step, {}, jaccard, ranked, 10 + layer)


def question(name: str, higher: float = 0.0) -> QuestionTrace:
    """Return a question of two measured steps; layer 2 is dense for one of the policies."""
    layers = [
        record(step, layer, {"streaming": 0.5 + gain} | more, 0.125 * layer)
        for step, gain in ((8, 0.0), (16, higher))
        for layer, more in ((2, {}), (3, {"lessismore": 0.75 + gain}))
    ]
    return QuestionTrace(name, 100, 17, cut_off=False, text="It is 4.", layers=tuple(layers))


TRACE = Trace(CONDITIONS, (question("a"), question("b", higher=0.25)))
