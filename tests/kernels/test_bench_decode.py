"""What keeps a time from being shown, and what a row is made of."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench import decode, gate
from lim_sglang.bench.batch import FilledBatch
from lim_sglang.bench.decode import Bench
from lim_sglang.bench.exact import differing_sets
from lim_sglang.bench.limit import StepSplit, Traffic
from lim_sglang.bench.points import DecodeOptions, ModelChoice, Point, Repeats
from lim_sglang.bench.runner import Contender
from lim_sglang.errors import LimError
from lim_sglang.kernels.bench import Spread
from lim_sglang.kernels.reference import Shares, attend_tokens, keep_tokens
from lim_sglang.schedule import Role
from lim_sglang.stats import Stats

POINT = Point(2, 6)
SLOTS = torch.tensor([[7, 3, 9, 5, 1, 8], [2, 12, 4, 10, 6, 11]])
BATCH = FilledBatch(POINT, SLOTS, None)
ROLES = (Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE)
BUDGET, SHARES = 4, Shares(sinks=1, selected=2, recent=1)
LAYERS = [
    SimpleNamespace(layer_id=n, tp_q_head_num=2, head_dim=8, scaling=0.3) for n in range(len(ROLES))
]


class Pool:
    """A KV cache of drawn K and V: 13 slots, one KV head."""

    dtype = store_dtype = torch.float32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (len(ROLES), 13, 1, 8)
        self.k_buffer = list(torch.randn(shape, generator=generator))
        self.v_buffer = list(torch.randn(shape, generator=generator))

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        """[P, G, D]."""
        return self.k_buffer[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        """[P, G, D]."""
        return self.v_buffer[layer]


class Backend:
    """Ours, as far as a bench sees it: one layer's attention over what is kept."""

    def __init__(self, runner: Any, dense: bool) -> None:
        self._runner = runner
        self._dense = dense

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        """[B, H * D]."""
        assert (k, v, save_kv_cache) == (None, None, False)
        assert ROLES[layer.layer_id] is Role.REUSE
        read = SLOTS if self._dense else self._runner.lim_kept_slots.view(2, -1).long()
        return attend(self._runner.token_to_kv_pool, layer, q, read)


def attend(pool: Pool, layer: Any, query: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Attention of each row over its slots: [B, H * D]."""
    buffers = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    rows = [
        attend_tokens(each.view(2, 8), *buffers, mine, layer.scaling)
        for each, mine in zip(query, slots, strict=True)
    ]
    return torch.stack(rows).flatten(1)


@dataclass
class Runner:
    """Stands in for `LimModelRunner`, healthy unless told otherwise."""

    logit: float = 0.0
    """What dense backends answer."""
    chunk: int = 2
    """Rows of the selector."""
    writes: bool = True
    """Whether the step writes slots and scores."""
    kept: torch.Tensor | None = None
    """What it keeps instead of the definition's sets."""
    reads: torch.Tensor | None = None
    """What the last layer of the graph reads instead; one slot for nothing that matters."""
    dense_layer: bool = False
    """Whether a REUSE layer by itself reads everything."""
    lim_roles: tuple[Role, ...] = ROLES
    decode_cuda_graph_runner: Any = None
    model: Any = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.lim_stats = Stats()
        self.lim_kept_slots = torch.zeros(2 * BUDGET, dtype=torch.int32)
        self.lim_selector = SimpleNamespace(decisive=torch.zeros(self.chunk, 2, 9), shares=SHARES)
        self.token_to_kv_pool = Pool()
        self.ours = Backend(self, self.dense_layer)
        self.attn_backend: Any = None

    def forward(self, _batch: Any) -> Any:
        """One step."""
        logits = torch.tensor([[0.0, self.logit]])
        if self.attn_backend is self.ours:
            self.lim_stats.sparse_rows += 2
            logits = self._sparse_step()
        return SimpleNamespace(
            can_run_graph=True, logits_output=SimpleNamespace(next_token_logits=logits)
        )

    def _sparse_step(self) -> torch.Tensor:
        scores = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
        wanted = [SLOTS[row, keep_tokens(scores[row], SHARES)] for row in range(2)]
        kept = torch.stack(wanted) if self.kept is None else self.kept
        if self.writes:
            self.lim_kept_slots[:] = kept.flatten()
            self.lim_selector.decisive[:, :, :6] = scores[-1:] if self.chunk == 1 else scores
        query = torch.ones(2, 16)
        reads = kept if self.reads is None else self.reads
        return attend(self.token_to_kv_pool, LAYERS[3], query, reads)


@pytest.fixture(autouse=True)
def four_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the runners have loaded."""
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter(LAYERS))


def bench(runner: Runner | None = None, budget: int = BUDGET) -> Any:
    """A bench with our backend and a dense one."""
    runner = runner or Runner()
    names = ("lim", "flashinfer")
    options = DecodeOptions(ModelChoice("qwen3-8b", None), (POINT,), names, Repeats(), budget, 0.88)
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


WRONG = SLOTS[:, [0, 2, 3, 5]]
"""Ascending, own, the newest included, and neither row's set."""


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Runner(logit=float("nan")), "flashinfer gives logits that are not finite"),
        (Runner(writes=False), "the kept slots are not 4 of each request's own"),
        (Runner(kept=WRONG), "row 0 keeps another set than its scores give"),
        (Runner(kept=WRONG), "row 1 keeps another set than its scores give"),
        (Runner(kept=WRONG, chunk=1), "row 1 keeps another set than its scores give"),
        (Runner(dense_layer=True), "row 1: attention in layer 3 is off by"),
        (Runner(reads=SLOTS), "layer 3 reads more than the kept slots"),
        (Runner(reads=torch.tensor([[0], [0]])), "layer 3 reads no kept slot"),
        (
            Runner(lim_roles=(Role.SELECT, Role.REUSE, Role.REUSE, Role.SELECT)),
            "layer 3 selects for no layer",
        ),
    ],
)
def test_no_time_is_shown_for_a_step_that_is_not_what_it_should_be(
    broken: Runner, words: str
) -> None:
    with pytest.raises(LimError, match="no time is shown") as caught:
        bench(broken)._verify(BATCH)
    assert words in str(caught.value)


def test_scores_that_the_step_did_not_write_prove_no_set() -> None:
    runner = Runner()
    runner.lim_selector.decisive.fill_(torch.nan)
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
