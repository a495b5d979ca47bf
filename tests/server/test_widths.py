"""How many tokens are drafted, by times of passes and by what was accepted."""

from collections.abc import Callable, Sequence

import pytest

from lim_sglang.lossless.widths import (
    MIN_GAIN,
    RETRY_CYCLES,
    Cycle,
    GivenWidth,
    PassTimes,
    StepTimes,
    WidthsByCost,
    _tokens,
)

CHOICES = (0, 4, 8, 12, 15)
DENSE_MS, TOKEN_MS = (4.3, 4.5, 5.0, 8.0), 36 * 260e-3 / (8 * 32768)
"""An 8B model on an H200."""
TIMES = PassTimes(
    draft=StepTimes((1, 8, 48), (4.6, 5.2, 9.0)),
    dense={1: StepTimes((1, 8, 64, 256), DENSE_MS, TOKEN_MS)}
    | {
        drafts + 1: StepTimes((1, 8, 24), (4.5, 4.8, 7 + drafts / 4), 1.2 * TOKEN_MS)
        for drafts in CHOICES[1:]
    },
    num_layers=36,
    num_select=2,
)
LONG, SHORT = [32768] * 8, [1100] * 8


def seen(accepted: Sequence[int], drafts: int, cycles: int = 200) -> WidthsByCost:
    """Return a choice that has seen cycles of the same acceptance."""
    widths = WidthsByCost(CHOICES, TIMES)
    for _ in range(cycles):
        widths.saw(Cycle(LONG, drafts, accepted, None))
    return widths


def serve(
    widths: WidthsByCost, lengths: Sequence[int], host_ms: Callable[[int], float], cycles: int
) -> tuple[list[int], float]:
    """Run cycles on a host that needs some time for each; return drafts, and ms a token."""
    chosen, total_ms, tokens = [], 0.0, 0
    for _ in range(cycles):
        drafts = widths.choose(lengths)
        on_gpu = TIMES.cycle(lengths, drafts) if drafts else TIMES.step(lengths)
        ms = max(on_gpu, host_ms(drafts))
        accepted = [min(drafts, 7)] * len(lengths)
        widths.saw(Cycle(lengths, drafts, accepted, ms))
        chosen.append(drafts)
        total_ms += ms
        tokens += 1 + accepted[0]
    return chosen, total_ms / tokens


def gain(lengths: Sequence[int], drafts: int, acceptance: float) -> float:
    """Return the promised speed of a cycle over dense steps."""
    return _tokens(drafts, acceptance) * TIMES.step(lengths) / TIMES.cycle(lengths, drafts)


def test_times_between_and_beyond_the_timed_rows_follow_them() -> None:
    dense = TIMES.dense[1]
    assert dense.of(8) == 4.5
    assert dense.of(36) == pytest.approx(4.75)
    assert dense.of(448) == pytest.approx(11.0)
    assert dense.of(8, 8 * 32768) == pytest.approx(4.5 + 36 * 0.26)
    assert TIMES.draft.of(1) == 4.6
    assert StepTimes((8,), (4.5,)).of(72) == 4.5


def test_long_contexts_are_drafted_and_short_ones_are_not() -> None:
    widths = seen([8] * 8, 8)
    assert widths.choose(LONG) == 15
    assert widths.choose(SHORT) == 0
    assert gain(SHORT, 8, 1.0) < MIN_GAIN < gain(LONG, 8, 1.0)


def test_the_number_of_drafts_falls_with_the_acceptance() -> None:
    found = [seen([count] * 8, 8).choose(LONG) for count in (8, 6, 4, 2, 0)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 15
    assert found[-1] == 0


def test_the_chosen_number_promises_most() -> None:
    widths, acceptance = seen([7] * 8, 8), 7 / 8
    for lengths in (LONG, [8192] * 40, [32768], [16384] * 4 + [900] * 4):
        gains = {drafts: gain(lengths, drafts, acceptance) for drafts in CHOICES if drafts}
        best = max(gains, key=lambda drafts: gains[drafts])
        assert widths.choose(lengths) == (best if gains[best] >= MIN_GAIN else 0)


def test_texts_that_were_hard_are_tried_again_ever_less_often() -> None:
    widths = seen([0] * 8, 8)
    found = [widths.choose(LONG) for _ in range(7 * RETRY_CYCLES)]
    places = [place for place, drafts in enumerate(found, 1) if drafts]
    assert places == [RETRY_CYCLES, 3 * RETRY_CYCLES, 7 * RETRY_CYCLES]
    # A short context gains at no acceptance, so nothing is tried.
    assert {seen([0] * 8, 8).choose(SHORT) for _ in range(2 * RETRY_CYCLES)} == {0}


def test_a_rejected_draft_is_one_trial_and_those_behind_it_none() -> None:
    assert seen([3], 4)._acceptance == pytest.approx(3 / 4, abs=0.01)
    assert seen([4], 4)._acceptance == pytest.approx(1, abs=0.01)
    assert seen([], 4)._acceptance == WidthsByCost(CHOICES, TIMES)._acceptance


def test_a_slow_host_is_noticed_and_dense_steps_are_hardly_slower() -> None:
    """Launching a verification layer by layer may take longer than the GPU needs for the cycle."""
    widths = WidthsByCost(CHOICES, TIMES)
    # The first cycles also compile kernels.
    compiling = iter([3000.0, 3000.0])
    chosen, _ = serve(widths, LONG, lambda drafts: next(compiling, 400.0) if drafts else 5.0, 100)
    assert set(chosen[-20:]) == {0}
    chosen, ms = serve(widths, LONG, lambda drafts: 400.0 if drafts else 5.0, 3000)
    assert set(chosen) == {0}
    assert ms < 1.01 * TIMES.step(LONG)


def test_a_host_that_is_slow_for_few_requests_may_be_fast_enough_for_many() -> None:
    widths = WidthsByCost(CHOICES, TIMES)
    few, many = [20_000], [32768] * 24
    serve(widths, few, lambda drafts: 60.0 if drafts else 5.0, 200)
    assert widths.choose(few) == 0
    chosen, ms = serve(widths, many, lambda drafts: 60.0 if drafts else 5.0, 200)
    assert set(chosen[-20:]) & {8, 12, 15}
    assert ms < 0.7 * TIMES.step(many)


def test_a_given_number_never_changes() -> None:
    widths = GivenWidth(7)
    widths.saw(Cycle(SHORT, 7, [0, 0], 1e6))
    assert widths.choose(SHORT) == 7
