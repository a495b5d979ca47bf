"""What keeps a time from being shown, and what a row is made of."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang.bench import decode, gate
from lim_sglang.bench.batch import FilledBatch
from lim_sglang.bench.decode import Bench
from lim_sglang.bench.limit import StepSplit, Traffic
from lim_sglang.bench.points import DecodeOptions, ModelChoice, Point, Repeats
from lim_sglang.bench.runner import Contender
from lim_sglang.errors import LimError
from lim_sglang.kernels.bench import Spread
from lim_sglang.schedule import Role
from lim_sglang.stats import Stats

POINT = Point(2, 6)
BATCH = FilledBatch(POINT, torch.arange(1, 13).view(2, 6), None)
ROLES = (Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE)


def bench(*, budget: int = 4, sparse: int = 2, logit: float = 0.0, wrong_set: bool = False) -> Any:
    """A bench whose runner counts `sparse` rows in each of our steps."""
    runner = SimpleNamespace(lim_stats=Stats(), attn_backend=None, decode_cuda_graph_runner=None)
    runner.lim_kept_slots = torch.zeros(8, dtype=torch.int32)

    def forward(_batch: Any) -> Any:
        runner.lim_stats.sparse_rows += sparse if runner.attn_backend == "lim" else 0
        if not wrong_set:
            runner.lim_kept_slots[:] = torch.tensor([1, 2, 3, 6, 7, 8, 9, 12])
        logits = torch.tensor([[0.0, logit]])
        return SimpleNamespace(
            can_run_graph=True, logits_output=SimpleNamespace(next_token_logits=logits)
        )

    runner.forward = forward
    options = DecodeOptions(
        ModelChoice("qwen3-8b", None), (POINT,), ("lim", "flashinfer"), Repeats(), budget, 0.88
    )
    names = ("lim", "flashinfer")
    contenders = [Contender(name, name, None) for name in names]
    return Bench(options, runner, contenders, Traffic(1000, 10, ROLES), 3000.0, lambda: None, {})


def test_a_sparse_step_is_told_from_a_dense_one() -> None:
    assert bench()._verify(BATCH) == 2


def test_within_the_budget_no_row_may_be_sparse() -> None:
    assert bench(budget=6, sparse=0)._verify(BATCH) == 0


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"sparse": 0}, "0 rows were sparse in a step, expected 2"),
        ({"sparse": 1}, "1 rows were sparse in a step, expected 2"),
        ({"budget": 6, "sparse": 2}, "2 rows were sparse in a step, expected 0"),
        ({"logit": float("nan")}, "flashinfer gives logits that are not finite"),
        ({"wrong_set": True}, "the kept slots are not 4 of each request's own"),
    ],
)
def test_no_time_is_shown_for_a_step_that_is_not_what_it_should_be(
    broken: dict[str, Any], words: str
) -> None:
    with pytest.raises(LimError, match="no time is shown") as caught:
        bench(**broken)._verify(BATCH)
    assert words in str(caught.value)


def test_a_row_has_the_limit_of_its_own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "can_split", lambda _contender: True)
    monkeypatch.setattr(
        decode,
        "time_layers",
        lambda _runner, _batch, _contender, roles, _flush: dict.fromkeys(set(roles), 0.5),
    )
    subject, spread = bench(), Spread(8.0, 8.0, 8.0)
    ours, dense = (
        subject._row(BATCH, contender, spread, spread, 2) for contender in subject.contenders
    )
    assert ours.num_bytes == 1000 + 2 * 10 * (6 * 2 + 4 * 2)
    assert dense.num_bytes == 1000 + 2 * 10 * 6 * 4
    assert (ours.sparse_rows, dense.sparse_rows) == (2, None)
    assert ours.split == StepSplit(1.0, 0.0, 1.0, 6.0)
    assert dense.split == StepSplit(2.0, 0.0, 0.0, 6.0)


def test_a_split_that_fails_leaves_the_step_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such graph")

    monkeypatch.setattr(decode, "can_split", lambda _contender: True)
    monkeypatch.setattr(decode, "time_layers", fail)
    subject, spread = bench(), Spread(8.0, 8.0, 8.0)
    row = subject._row(BATCH, subject.contenders[0], spread, spread, 2)
    assert row.split is None
    assert row.split_error == "RuntimeError: no such graph"


def let_gate_find(monkeypatch: pytest.MonkeyPatch, failures: list[str]) -> None:
    """Let the exactness check find these failures."""
    module: Any = SimpleNamespace(check_gpu=lambda: failures)
    monkeypatch.setitem(sys.modules, "lim_sglang.gate", module)


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
