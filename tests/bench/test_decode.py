"""What keeps a time from being shown, and what a row is made of."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench import decode, gate
from lim_sglang.bench.batch import kept_slots
from lim_sglang.bench.decode import Bench
from lim_sglang.bench.exact import differing_sets
from lim_sglang.bench.limit import StepSplit, Traffic
from lim_sglang.bench.points import DecodeOptions, ModelChoice, Repeats
from lim_sglang.bench.runner import Contender
from lim_sglang.config import Role
from lim_sglang.errors import LimError
from lim_sglang.kernels.bench import Spread
from tests.bench.fake_runner import BATCH, BUDGET, MIXED, ROLES, SHORT, SLOTS, Runner, layers


@pytest.fixture(autouse=True)
def four_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the runners have loaded."""
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter(layers()))


def bench(runner: Runner | None = None, budget: int = BUDGET) -> Any:
    """A bench with our backend and a dense one."""
    runner = runner or Runner()
    names = ("lim", "flashinfer")
    options = DecodeOptions(
        ModelChoice("qwen3-8b", None), (runner.batch.point,), names, Repeats(), budget, 0.88
    )
    contenders = [Contender("lim", runner.ours, None), Contender("flashinfer", "dense", None)]
    return Bench(options, runner, contenders, Traffic(1000, 10, ROLES), 3000.0, lambda: None, {})


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_step_that_does_what_it_should_may_be_timed(chunk: int) -> None:
    subject = bench(Runner(chunk=chunk))
    values = [buffer.clone() for buffer in subject.runner.token_to_kv_pool.v_buffer]
    assert subject._verify(BATCH) == 2
    after = subject.runner.token_to_kv_pool.v_buffer
    assert all(map(torch.equal, values, after)), "the check left its marks in the cache"


def test_within_the_budget_no_set_is_looked_at() -> None:
    bench(Runner(writes=False), budget=6)._verify(BATCH)


def test_a_schedule_without_reuse_is_dense() -> None:
    bench(Runner(lim_roles=(Role.FULL,) * 4), budget=6)._verify(BATCH)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_mixed_step_may_be_timed_and_its_sparse_rows_count(chunk: int) -> None:
    assert bench(Runner(chunk=chunk, batch=MIXED))._verify(MIXED) == 2


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_step_over_an_fp8_cache_may_be_timed(cache_dtype: torch.dtype) -> None:
    subject = bench(Runner(cache_dtype=cache_dtype))
    values = [buffer.clone() for buffer in subject.runner.token_to_kv_pool.v_buffer]
    assert subject._verify(BATCH) == 2
    after = subject.runner.token_to_kv_pool.v_buffer
    assert all(map(torch.equal, values, after)), "the check left its marks in the cache"


WRONG = tuple(SLOTS[:, [0, 2, 3, 5]])
"""Ascending, own, the newest included, and neither row's set."""


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Runner(logit=float("nan")), "flashinfer gives logits that are not finite"),
        (Runner(writes=False), "row 0, 1 does not keep 4 slots"),
        (Runner(kept=WRONG), "row 0 keeps another set than its scores give"),
        (Runner(kept=WRONG), "row 1 keeps another set than its scores give"),
        (Runner(kept=WRONG, chunk=1), "row 1 keeps another set than its scores give"),
        (Runner(dense_layer=True), "row 1: attention in layer 3 is off by"),
        (Runner(reads=SLOTS.unbind()), "layer 3 reads more than the kept slots"),
        (Runner(reads=[torch.tensor([0])] * 2), "layer 3 reads no kept slot"),
        (
            Runner(lim_roles=(Role.SELECT, Role.REUSE, Role.REUSE, Role.SELECT)),
            "layer 3 selects for no layer",
        ),
        # The last row is within the budget: what is proved of it says nothing of the others.
        (Runner(batch=MIXED, kept=(*WRONG, SHORT), chunk=1), "row 1 keeps another set"),
        (Runner(batch=MIXED, reads=MIXED.slots), "layer 3 reads more than the kept slots"),
        (Runner(batch=MIXED, reads=[torch.tensor([0])] * 3), "layer 3 reads no kept slot"),
        (Runner(batch=MIXED, dense_layer=True), "row 0: attention in layer 3 is off by"),
        (Runner(cache_dtype=torch.float8_e4m3fn, reads=SLOTS.unbind()), "layer 3 reads more"),
        (Runner(cache_dtype=torch.float8_e5m2, reads=SLOTS.unbind()), "layer 3 reads more"),
        (Runner(cache_dtype=torch.float8_e4m3fn, reads=[torch.tensor([0])] * 2), "reads no kept"),
        (Runner(cache_dtype=torch.float8_e4m3fn, dense_layer=True), "row 0: attention in layer 3"),
    ],
)
def test_no_time_is_shown_for_a_step_that_is_not_what_it_should_be(
    broken: Runner, words: str
) -> None:
    with pytest.raises(LimError, match="no time is shown") as caught:
        bench(broken)._verify(broken.batch)
    assert words in str(caught.value)


def test_a_short_row_that_loses_a_token_is_found() -> None:
    # The sparse rows keep the sets of their scores, so that nothing else is wrong.
    sound = Runner(batch=MIXED)
    sound.attn_backend = sound.ours
    sound.forward(None)
    kept = kept_slots(sound, MIXED.point, BUDGET)
    assert kept is not None
    broken = Runner(batch=MIXED, kept=(*kept[:2], SHORT[[0, 0, 2]]))
    with pytest.raises(LimError, match=r"2x6\+1x3: row 2 does not keep 4 slots, or all that it"):
        bench(broken)._verify(MIXED)


def test_scales_of_k_and_v_are_the_layer_s(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = layers(k_scale=4.0, v_scale=0.5)
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter(scaled))
    bench(Runner(cache_dtype=torch.float8_e4m3fn))._verify(BATCH)
    for other in (layers(k_scale=1.0, v_scale=0.5), layers(k_scale=4.0)):
        with pytest.raises(LimError, match="row 0: attention in layer 3 is off by"):
            bench(Runner(cache_dtype=torch.float8_e4m3fn, acts_as=other[3]))._verify(BATCH)


def test_scores_that_the_step_did_not_write_prove_no_set() -> None:
    runner = Runner()
    runner.lim_selector.deciding_scores.fill_(torch.nan)
    found = differing_sets(runner.lim_selector, BATCH, WRONG)
    assert found == [f"row {row} has scores that are not finite, or not written" for row in (0, 1)]


def test_a_row_has_the_limit_of_its_own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "can_split", lambda _contender: True)
    monkeypatch.setattr(
        decode,
        "time_layers",
        lambda _runner, _batch, _contender, roles, _flush: dict.fromkeys(set(roles), 0.5),
    )
    monkeypatch.setattr(decode, "count_launches", lambda contender: len(contender.name))
    subject, spread = bench(), Spread(8.0, 8.0, 8.0)
    ours, dense = (
        subject._row(BATCH, contender, spread, spread, 2) for contender in subject.contenders
    )
    assert ours.num_bytes == 1000 + 2 * 10 * (6 * 2 + 4 * 2)
    assert dense.num_bytes == 1000 + 2 * 10 * 6 * 4
    assert (ours.sparse_rows, dense.sparse_rows) == (2, None)
    assert (ours.kernel_launches, dense.kernel_launches) == (3, 10)
    assert ours.split == StepSplit(1.0, 0.0, 1.0, 6.0)
    assert dense.split == StepSplit(2.0, 0.0, 0.0, 6.0)


def test_a_split_that_fails_leaves_the_step_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such graph")

    monkeypatch.setattr(decode, "can_split", lambda _contender: True)
    monkeypatch.setattr(decode, "time_layers", fail)
    monkeypatch.setattr(decode, "count_launches", lambda _contender: None)
    subject, spread = bench(), Spread(8.0, 8.0, 8.0)
    row = subject._row(BATCH, subject.contenders[0], spread, spread, 2)
    assert row.split is None
    assert row.split_error == "RuntimeError: no such graph"


def let_gate_find(monkeypatch: pytest.MonkeyPatch, failures: list[str]) -> None:
    """Let the exactness check find these failures."""
    module: Any = SimpleNamespace(verify_gpu=lambda: failures)
    monkeypatch.setitem(sys.modules, "lim_sglang.verify_gpu", module)


def test_kernels_that_are_not_exact_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    let_gate_find(monkeypatch, ["Qwen3-8B: row 1: another ranking", "fp8 cache: scores are off"])
    with pytest.raises(LimError) as caught:
        gate.check_exactness()
    message = str(caught.value)
    assert "no time is shown" in message
    assert "\n  - Qwen3-8B: row 1: another ranking\n  - fp8 cache: scores are off" in message


def test_exact_kernels_may_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    let_gate_find(monkeypatch, [])
    gate.check_exactness()


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LimError, match="needs an NVIDIA GPU"):
        gate.require_gpu()
