"""Exactness before any time: of kernels on a GPU, and of the step that is timed."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench import verify
from lim_sglang.bench.model_runner import Contender, FilledBatch
from lim_sglang.bench.workloads import Point, SparseReads
from lim_sglang.errors import LimError
from lim_sglang.policies.policy import Role
from tests.fakes.model_runner import BATCH, BUDGET, MIXED, SHORT, SLOTS, Runner, layers


@pytest.fixture(autouse=True)
def four_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runners have a model of four layers."""
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter(layers()))


def verify_steps(runner: Runner, budget: int = BUDGET) -> dict[str, int]:
    """Check a step of our backend and of a dense one; returns our sparse rows by name."""
    contenders = [Contender("lim", runner.ours, None), Contender("flashinfer", "dense", None)]
    return verify.require_exact_steps(runner, runner.batch, contenders, budget)


@pytest.mark.parametrize(
    ("sound", "budget", "sparse_rows"),
    [
        (Runner(chunk=1), BUDGET, 2),
        (Runner(chunk=2), BUDGET, 2),
        (Runner(chunk=1, batch=MIXED), BUDGET, 2),
        (Runner(chunk=2, batch=MIXED), BUDGET, 2),
        (Runner(chunk=3, batch=MIXED), BUDGET, 2),
        (Runner(cache_dtype=torch.float8_e4m3fn), BUDGET, 2),
        (Runner(cache_dtype=torch.float8_e5m2), BUDGET, 2),
        # No row is over the budget, or no layer reads less: no set is examined.
        (Runner(writes=False), 6, 2),
        (Runner(lim_roles=(Role.FULL,) * 4), 6, 2),
    ],
)
def test_an_exact_step_may_be_timed_and_leaves_the_cache_as_it_was(
    sound: Runner, budget: int, sparse_rows: int
) -> None:
    values = [buffer.clone() for buffer in sound.token_to_kv_pool.v_buffer]
    assert verify_steps(sound, budget) == {"lim": sparse_rows}
    assert all(map(torch.equal, values, sound.token_to_kv_pool.v_buffer))


KEPT = SLOTS[:, [0, 2, 4, 5]]
WRONG = tuple(SLOTS[:, [0, 2, 3, 5]])
"""Slots of each row that are ascending, own, the newest included, and neither row's set."""


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Runner(logit=float("nan")), "flashinfer gives logits that are not finite"),
        (Runner(writes=False), "row 0, 1 does not keep 4 slots"),
        (Runner(kept=WRONG), "row 0 keeps another set than its scores give; row 1 keeps another"),
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
        (Runner(batch=MIXED, kept=(*WRONG, SHORT[[0, 0, 2]])), "row 2 does not keep 4 slots, or"),
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
        verify_steps(broken)
    assert words in str(caught.value)


def test_a_wrong_step_is_refused_before_the_next_backend_runs() -> None:
    """Other ranks would not come to its collective operations."""
    broken = Runner(kept=WRONG, logit=float("nan"))
    with pytest.raises(LimError, match=r"row 1 keeps another set than its scores give$"):
        verify_steps(broken)
    assert broken.attn_backend is broken.ours


@pytest.mark.parametrize(
    ("kept", "tokens"),
    [
        (KEPT, 8.0),
        # Two KV heads of two query heads each, whose lists overlap: 5 and 4 tokens a row.
        (torch.stack([SLOTS[:, [0, 2, 4, 5]], SLOTS[:, [1, 2, 4, 5]], KEPT, KEPT], 1), 9.0),
    ],
)
def test_tokens_read_are_the_union_of_the_lists_of_a_kv_heads_query_heads(
    kept: torch.Tensor, tokens: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = SimpleNamespace(tp_k_head_num=2)
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter([layer]))
    runner = Runner()
    runner.lim_kept_slots = torch.cat(list(kept), -1).int()
    runner.lim_summaries = {2: torch.zeros(9, 2, 4), 3: torch.zeros(9, 2, 4)}
    runner.lim_selector.read_once = lambda layer: 100 * layer
    found = verify.sparse_reads(runner, BATCH)
    # Two rows of six blocks of one token, in two layers of 32 bytes a block; not the newest block.
    assert found == SparseReads(num_layers=2, tokens=tokens, summary_bytes=2 * 10 * 32 + 500)


def test_scales_of_k_and_v_are_the_layers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = layers(k_scale=4.0, v_scale=0.5)
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter(scaled))
    verify_steps(Runner(cache_dtype=torch.float8_e4m3fn))
    for other in (layers(k_scale=1.0, v_scale=0.5), layers(k_scale=4.0)):
        with pytest.raises(LimError, match="row 0: attention in layer 3 is off by"):
            verify_steps(Runner(cache_dtype=torch.float8_e4m3fn, acts_as=other[3]))


def test_scores_that_the_step_did_not_write_prove_no_set() -> None:
    runner = Runner()
    runner.lim_selector.deciding_scores.values.fill_(torch.nan)
    found = verify.differing_sets(runner.lim_selector, BATCH, WRONG)
    assert found == [f"row {row} has scores that are not finite, or not written" for row in (0, 1)]


@pytest.mark.parametrize("bad", [False, True])
def test_a_set_is_proved_by_the_scores_of_all_ranks(bad: bool) -> None:
    """The other rank's heads prefer the tokens that this rank's like least."""
    runner, calls = Runner(), []
    selector = runner.lim_selector
    scores = torch.arange(6.0).expand(2, 6).clone()
    others = -scores[:1]
    for view in selector.own_scores.rows([0, 6, 12]):
        view[:, :6] = torch.nan if bad else scores
    selector.of_all_ranks = lambda own: calls.append(own) or torch.cat([others, own])
    kept = [mine[selector.keep(torch.cat([others, scores]), 6)] for mine in SLOTS]
    assert not torch.equal(kept[0], SLOTS[0][selector.keep(scores, 6)])
    found = verify.differing_sets(selector, BATCH, kept)
    assert [row[:5] for row in found] == (["row 0", "row 1"] if bad else [])
    assert [own.shape for own in calls] == [(2, 6)] * 2  # for each row, whatever the row before


@pytest.mark.parametrize(
    ("kept", "rows"),
    [
        (KEPT, []),
        (KEPT.flip(0), [0, 1]),
        (KEPT[:1].expand(2, 4), [1]),
        (KEPT.flip(1), [0, 1]),
        (SLOTS[:, [0, 0, 4, 5]], [0, 1]),
        (SLOTS[:, [0, 1, 2, 3]], [0, 1]),
        (torch.zeros(2, 4, dtype=torch.int64), [0, 1]),
        (torch.full((2, 4), 1000), [0, 1]),
    ],
    ids=["sound", "swapped", "row-0-s", "descending", "twice", "no-newest", "untouched", "beyond"],
)
def test_a_row_keeps_its_own_slots_in_order_newest_last(
    kept: torch.Tensor, rows: list[int]
) -> None:
    assert verify.rows_with_wrong_slots(BATCH, list(kept)) == rows


BETWEEN = FilledBatch(Point((6, 3, 6)), (SLOTS[0], SHORT, SLOTS[1]), None)
"""A mixed batch whose short row is in the middle."""


@pytest.mark.parametrize(
    ("short", "rows"),
    [
        (SHORT, []),
        (SHORT.flip(0), [1]),
        (SHORT[[0, 2, 2]], [1]),
        (torch.tensor([15, 0, 16]), [1]),
        (SHORT[:2], [1, 2]),  # all rows after it begin too early
    ],
    ids=["sound", "descending", "twice", "not-written", "one-too-few"],
)
def test_a_short_row_that_loses_a_slot_is_found(short: torch.Tensor, rows: list[int]) -> None:
    # The buffer is longer than the batch needs, as in a runner.
    buffer = torch.cat([KEPT[0], short, KEPT[1], torch.full((5,), -1)]).to(torch.int32)
    fake = SimpleNamespace(lim_kept_slots=buffer, lim_policy=Runner().lim_policy)
    kept = verify.kept_slots(fake, BETWEEN.point)
    assert kept is not None
    assert verify.rows_with_wrong_slots(BETWEEN, kept) == rows


def test_a_runner_without_kept_slots_proves_no_set() -> None:
    assert verify.kept_slots(SimpleNamespace(), BATCH.point) is None
    runner = Runner(writes=False)
    del runner.lim_kept_slots
    with pytest.raises(LimError, match="the runner keeps no slots, so no set is proved"):
        verify_steps(runner)


@pytest.mark.parametrize(
    "failures", [[], ["Qwen3-8B: row 1: another ranking", "fp8: scores are off"]]
)
def test_kernels_that_are_not_exact_are_listed(
    monkeypatch: pytest.MonkeyPatch, failures: list[str]
) -> None:
    module: Any = SimpleNamespace(verify_gpu=lambda: failures)
    monkeypatch.setitem(sys.modules, "lim_sglang.verify_gpu", module)
    monkeypatch.setattr(verify, "require_gpu", lambda: None)
    words = "not exact on this GPU:\n  - Qwen3-8B: row 1: another ranking\n  - fp8: scores are off"
    with pytest.raises(LimError, match=words) if failures else nullcontext():
        verify.require_exact_kernels()


def test_without_a_gpu_and_with_interpreted_kernels_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LimError, match="needs an NVIDIA GPU"):
        verify.require_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verify, "interpreted", lambda: True)
    with pytest.raises(LimError, match="TRITON_INTERPRET is set"):
        verify.require_gpu()
