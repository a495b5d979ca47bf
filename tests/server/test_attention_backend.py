"""The GPU backend: attention over kept slots, interpreted; with a GPU, inside SGLang's runner.

On a GPU: parity with dense decode, CUDA graphs, padding, chunks, no waiting and no allocation.
"""

import os
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import attention_backend
from lim_sglang.attention_backend import (
    DENSE_PASS,
    SECOND_READING,
    LimAttnBackend,
    ScoreStoringWrapper,
    SparseDecodeWrapper,
)
from lim_sglang.audit import ObservedRow
from lim_sglang.compat import (
    FLASHINFER_VERSION,
    TENSOR_CORE_VAR,
    DecodeMetadata,
    FlashInferAttnBackend,
)
from lim_sglang.errors import ServerError
from lim_sglang.kernels.reference import attend_tokens
from lim_sglang.kernels.scores import ScoreStoringAttention
from lim_sglang.kernels.verify import relative_error
from lim_sglang.policies.lessismore import LessIsMore
from lim_sglang.policies.policy import Role
from tests.server.gpu_rig import (
    REUSE,
    SELECT,
    Graph,
    Rig,
    Step,
    fill_cache,
    make_step,
    run_eager,
    run_layers,
    wrong_rows,
)

SMALL_BUDGET, MAX_ROWS = 24, 4
HEADS, KV_HEADS, DIM = 4, 2, 64


def sparse_decode(num_slots: int = MAX_ROWS * SMALL_BUDGET) -> SparseDecodeWrapper:
    """Make the wrapper of a backend of up to four rows; the kept slots are random."""
    shape = SimpleNamespace(
        num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, data_type=torch.float32
    )
    backend = SimpleNamespace(kv_last_page_len=torch.ones(MAX_ROWS), indices_updater_decode=shape)
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(200, generator=generator)[:num_slots].int()
    return SparseDecodeWrapper(backend, slots, LessIsMore(budget=SMALL_BUDGET))


def cache() -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of 200 slots."""
    generator = torch.Generator().manual_seed(4)
    keys, values = torch.randn(2, 200, KV_HEADS, DIM, generator=generator)
    return keys, values


def attended(
    kept: SparseDecodeWrapper,
    query: torch.Tensor,
    *,
    sm_scale: float = 0.125,
    logits_soft_cap: float | None = 0.0,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor:
    """Call the wrapper as SGLang's decode does."""
    return kept.forward(
        query,
        cache(),
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def test_rows_read_as_many_slots_as_they_keep_one_row_after_the_other() -> None:
    kept = sparse_decode()
    query = torch.randn(3, HEADS, DIM, generator=torch.Generator().manual_seed(5))
    for lengths in ([30, 5, 24], [1, 300, 2]):  # the second step has forgotten the first
        kept.begin_step(torch.tensor(lengths))
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + min(length, SMALL_BUDGET))
        assert kept.kept_indptr.tolist() == ends
        found = attended(kept, query)
        for row, (first, last) in enumerate(pairwise(ends)):
            slots = kept.kept_slots[first:last].long()
            wanted = attend_tokens(query[row], *cache(), slots, 0.125)
            assert torch.allclose(found[row], wanted, atol=1e-5)


def test_a_step_of_other_rows_leaves_the_memory_where_it_is() -> None:
    kept = sparse_decode()
    kept.begin_step(torch.tensor([9, 9, 9, 9]))
    first = kept.kept_indptr.data_ptr()
    kept.begin_step(torch.tensor([30]))
    assert kept.kept_indptr.tolist() == [0, 24]
    assert kept.kept_indptr.data_ptr() == first  # a CUDA graph reads it


def test_scales_and_soft_cap_reach_the_kernel() -> None:
    kept = sparse_decode()
    query = torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(5))
    kept.begin_step(torch.tensor([20]))
    plain = attended(kept, query)
    assert torch.allclose(attended(kept, query, sm_scale=0.0625, k_scale=2.0), plain, atol=1e-6)
    assert torch.allclose(attended(kept, query, v_scale=3.0), 3 * plain, atol=1e-5)
    assert torch.allclose(attended(kept, query, logits_soft_cap=1e4), plain, atol=1e-3)
    assert not torch.allclose(attended(kept, query, logits_soft_cap=0.5), plain, atol=1e-2)
    assert torch.equal(attended(kept, query, logits_soft_cap=None), plain)


class Attention:
    """A stand-in for `ScoreStoringAttention`: doubles the query, notes its arguments."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()

    def run(self, _planned: Any, query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Return twice the query."""
        self.arguments = arguments
        return 2 * query


def test_scales_reach_the_score_storing_pass_and_a_soft_cap_is_refused() -> None:
    attention = Attention()
    scores, lse = torch.zeros(1), torch.zeros(1)
    selector = SimpleNamespace(scores=scores, lse=lse, budget=SMALL_BUDGET)
    wrapper = ScoreStoringWrapper(attention, None, selector)  # type: ignore[arg-type]
    query, kv_cache = torch.ones(1, HEADS, DIM), cache()
    options = {"sm_scale": 0.5, "logits_soft_cap": None, "k_scale": 3.0, "v_scale": 5.0}
    assert torch.equal(wrapper.forward(query, kv_cache, **options), 10 * query)
    assert attention.arguments == (kv_cache, 1.5, scores, SMALL_BUDGET, lse)
    with pytest.raises(ValueError, match="without a soft-cap"):
        wrapper.forward(query, kv_cache, **options | {"logits_soft_cap": 30.0})


ROLES = (Role.FULL, Role.SELECT, Role.REUSE, Role.SELECT, Role.REUSE)


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return a function that runs layers of each role and lists the wrappers that SGLang used, and
    the keys from which slots were selected."""
    sparse = SimpleNamespace(name="sparse", kept_indptr=None, kept_slots="kept")
    dense = SimpleNamespace(name="dense", _paged_kv_indptr_buf=None, _paged_kv_indices_buf=None)
    planned = DecodeMetadata([dense])

    class Recorder:
        """A selector that notes the keys that it is given."""

        def select(
            self, _query: Any, keys: Any, step: Any, *, scale: float, first_chunk_is_scored: bool
        ) -> None:
            used.append((keys, step.kept, scale, first_chunk_is_scored))

    def decode(_self: Any, q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        (wrapper,) = _self.forward_metadata.decode_wrappers
        used.append(getattr(wrapper, "name", type(wrapper).__name__))
        if fails:
            raise KeyError
        return q

    used: list[Any] = []
    fails = False
    monkeypatch.setattr(FlashInferAttnBackend, "forward_decode", decode)

    def run(*, fail: bool = False, scores_in_pass: bool = True) -> list[Any]:
        nonlocal fails
        fails = fail
        used.clear()
        backend = object.__new__(LimAttnBackend)
        backend.roles, backend.audit, backend.observer = ROLES, None, None
        backend.selector = backend.step_selector = Recorder()
        backend.sparse_decode, backend.scoring = sparse, Attention() if scores_in_pass else None
        backend.forward_metadata, backend.window_layer = planned, None
        backend.token_to_kv_pool = SimpleNamespace(get_key_buffer="keys of layer {}".format)
        for layer in range(len(ROLES)):
            with pytest.raises(KeyError) if fail else nullcontext():
                traits = SimpleNamespace(layer_id=layer, logit_cap=0.0, scaling=0.5)
                vars(traits).update(tp_q_head_num=1, head_dim=1, k_scale_float=None)
                backend.forward_decode(*[torch.ones(1)] * 3, traits, None, save_kv_cache=True)
            assert backend.forward_metadata is planned
        return list(used)

    return run


@pytest.mark.parametrize(
    ("scores_in_pass", "select", "is_scored"),
    [(True, "ScoreStoringWrapper", True), (False, "dense", False)],
)
def test_a_role_decides_what_sglangs_decode_reads(
    dispatch: Callable[..., list[Any]], scores_in_pass: bool, select: str, is_scored: bool
) -> None:
    expected: list[Any] = ["dense"]
    for layer in (1, 3):  # each SELECT layer writes the slots that the REUSE layer after it reads
        expected += [select, (f"keys of layer {layer}", "kept", 0.5, is_scored), "sparse"]
    assert dispatch(scores_in_pass=scores_in_pass) == expected


def test_a_layer_that_fails_leaves_sglangs_plan_as_it_was(
    dispatch: Callable[..., list[Any]],
) -> None:
    assert dispatch(fail=True) == ["dense", *["ScoreStoringWrapper", "sparse"] * 2]


def test_more_rows_than_there_is_memory_for_are_refused_in_words() -> None:
    with pytest.raises(ServerError, match=r"runs 4 requests at once.*--max-running-requests 2"):
        sparse_decode(2 * SMALL_BUDGET)
    kept = sparse_decode()
    with pytest.raises(ValueError, match="out must have 6 elements, not 5"):
        kept.begin_step(torch.tensor([1, 1, 1, 1, 1]))


def test_a_start_whose_dense_pass_stores_wrong_scores_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = object.__new__(LimAttnBackend)
    backend.indices_updater_decode = SimpleNamespace(
        num_qo_heads=32,
        num_kv_heads=8,
        head_dim=128,
        q_data_type=torch.bfloat16,
        data_type=torch.float8_e4m3fn,
    )
    backend.workspace_buffer = "workspace"
    gpu, tested = SimpleNamespace(multi_processor_count=132), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    found = ["row 0: 640 of 198304 stored scores are missing"]

    def differences(*given: Any) -> list[str]:
        tested.append(given)
        return found

    monkeypatch.setattr(attention_backend, "self_test_differences", differences)
    attention: Any = Attention()
    with pytest.raises(ServerError) as refused:
        backend._test_scoring(attention)
    words = f"in a self-test with FlashInfer {FLASHINFER_VERSION} {found[0]}. Install flashinfer"
    assert words in str(refused.value)
    assert f"set {TENSOR_CORE_VAR}=false" in str(refused.value)
    found.clear()
    backend._test_scoring(attention)
    (_, batch, workspace), _ = tested
    assert (batch.heads, batch.kv_heads, batch.dim, workspace) == (32, 8, 128, "workspace")
    assert (batch.dtype, batch.key_dtype) == (torch.bfloat16, torch.float8_e4m3fn)


BUDGET = 256
RAGGED = {
    "one": [700],
    "around-the-budget": [255, 256, 257, 1],
    "eight": [1, 40, 300, 2000, 256, 511, 3000, 900],
    "forty-four": [60 * n + 1 for n in range(44)],
    "a-hundred-and-twenty-eight": [7 * n + 1 for n in range(128)],
}
PICKED: Mapping[str, Any] = {
    "select_layers": (),
    "dense_layers": (0, 1, 2),
    "pick_layers": (3,),
}
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "rank": {},
    "mass": {"ranking": "mass"},
    "rank-picked": PICKED,
    "mass-picked": {"ranking": "mass", **PICKED},
    "streaming": {"policy": "streaming", "dense_layers": (0, 1, 2)},
    "omnikv": {"policy": "omnikv"},
    "delta": {"policy": "delta"},
    "tidal": {"policy": "tidal"},
    "tidal-recent": {"policy": "tidal", "recent_ratio": 0.25, "sinks": 4},
    "quest": {"policy": "quest", "dense_layers": (0, 1, 2)},
    "quest-kv-head": {"policy": "quest", "dense_layers": (0, 1, 2), "shared_by": "kv_head"},
    "quest-all": {"policy": "quest", "dense_layers": (0, 1, 2), "shared_by": "all"},
    "seer": {"policy": "seer", "dense_layers": (0, 1, 2)},
}
"""Settings under which layer 2 reads everything and layer 3 what is kept."""
EIGHT, OTHER_EIGHT = RAGGED["eight"], [3500, 7, 256, 257, 1999, 1, 600, 601]


@pytest.fixture
def backend(rig: Rig) -> Any:
    """Return the backend of LessIsMore with a small budget, on a fresh cache."""
    fill_cache(rig)
    return rig.use_lim(BUDGET)


def skip_gate_of_fp8(rig: Rig, settings: Mapping[str, Any]) -> None:
    """Skip a gate on a cache that does not give back the keys that it was trained on."""
    if settings.get("policy") == "seer" and rig.runner.kv_cache_dtype.itemsize == 1:
        pytest.skip("a gate is refused on an fp8 cache")


def prompts(*lengths: int) -> list[list[int]]:
    """Return prompts of random token ids."""
    rng = random.Random(5)
    return [[rng.randrange(5, 1000) for _ in range(length)] for length in lengths]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{"budget": 1024}, {"budget": BUDGET, "select_layers": tuple(range(6))}],
    ids=["budget over the length", "all layers select"],
)
def test_a_step_that_reads_everything_differs_from_the_dense_backend_by_rounding_alone(
    rig: Rig, settings: Mapping[str, Any]
) -> None:
    """At most twice the difference of SGLang's Triton backend, and far less than a sparse set's."""
    asked = prompts(30, 400, 700, 120)
    rig.use_dense()
    forced = rig.greedy(asked, 24).tolist()
    dense = rig.teacher_forced(asked, forced).float()
    rig.use_dense("triton")
    rounding = relative_error(rig.teacher_forced(asked, forced), dense)
    rig.use_lim(**settings)
    error = relative_error(rig.teacher_forced(asked, forced), dense)
    rig.use_lim(64)
    sparse = relative_error(rig.teacher_forced(asked, forced), dense)
    assert error <= min(2 * rounding, sparse / 4), (error, rounding, sparse)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", RAGGED)
def test_graphs_and_eager_steps_select_and_attend_as_the_definition_says(
    rig: Rig, name: str, settings: Mapping[str, Any]
) -> None:
    skip_gate_of_fp8(rig, settings)
    fill_cache(rig)
    backend = rig.use_lim(BUDGET, **settings)
    lengths = RAGGED[name]
    graph = Graph(rig, backend, make_step(rig, [1] * len(lengths), seed=1))
    step = make_step(rig, lengths)
    rig.summarize(step)
    assert not wrong_rows(rig, backend, step, graph.run(step))
    assert not wrong_rows(rig, backend, step, run_eager(rig, backend, step))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
def test_an_observer_sees_what_each_layer_of_an_eager_step_has_kept(
    rig: Rig, settings: Mapping[str, Any]
) -> None:
    skip_gate_of_fp8(rig, settings)
    fill_cache(rig)
    backend = rig.use_lim(BUDGET, **settings)
    step = make_step(rig, RAGGED["eight"], padding=2)
    rig.summarize(step)
    seen: list[ObservedRow] = []
    backend.observer = SimpleNamespace(note_layer=seen.append)
    try:
        found = run_eager(rig, backend, step)
    finally:
        backend.observer = None
    first = min(backend.choosing)
    rows, (heads, _, dim) = len(step.slots), rig.heads
    assert [row.inputs.layer for row in seen] == [SELECT] * rows + [REUSE] * rows
    assert [row.selects for row in seen] == [first == SELECT] * rows + [first == REUSE] * rows
    for row, shown in enumerate(seen):
        layer, slots = shown.inputs.layer, step.slots[row % rows].long()
        keys = rig.runner.token_to_kv_pool.get_key_buffer(layer)
        query = step.query[layer == REUSE].view(rows, heads, dim)
        assert torch.equal(shown.inputs.query, query[row % rows])
        assert torch.equal(shown.inputs.keys.float(), keys[slots].float())
        assert (shown.kept.diff() > 0).all()
        if len(slots) <= BUDGET or layer < first:
            assert shown.kept.tolist() == [list(range(len(slots)))]
        else:
            kept = found.kept[row % rows].view(-1, shown.kept.shape[1])
            assert torch.equal(slots[shown.kept].sort().values, kept.long().sort().values)


SUMMARIZED: Mapping[str, Mapping[str, Any]] = {
    "quest": {"policy": "quest"},
    "quest-all": {"policy": "quest", "shared_by": "all"},
    "seer": {"policy": "seer"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SUMMARIZED.values(), ids=SUMMARIZED)
def test_prefill_and_decode_leave_the_summaries_of_their_keys(
    rig: Rig, settings: Mapping[str, Any]
) -> None:
    """Graphs among them; lengths pass the ends of pages."""
    skip_gate_of_fp8(rig, settings)
    backend = rig.use_lim(192, **settings)
    for summaries in backend.summaries.values():
        summaries.fill_(torch.nan)
    lengths, num_new = (1, 15, 16, 63, 64, 65, 300, 511), 20
    rig.greedy(prompts(*lengths), num_new)
    table, page = rig.runner.req_to_token_pool.req_to_token, backend.selector.page
    for layer, summaries in backend.summaries.items():
        keys = rig.runner.token_to_kv_pool.get_key_buffer(layer)
        for row, length in enumerate(lengths, start=1):
            slots = table[row, : length + num_new - 1].long()
            whole = len(slots) // page * page
            found = summaries[slots[::page] // page]
            of_row = keys[slots[:whole]]
            assert backend.selector.has_right_summaries(layer, of_row, found[: whole // page]).all()
            assert found[whole // page :].float().isnan().all()


@pytest.mark.gpu
def test_a_graph_keeps_what_an_eager_step_keeps_with_the_same_bits_again(
    rig: Rig, backend: Any
) -> None:
    graph = Graph(rig, backend, make_step(rig, [1] * 8, seed=1))
    step = make_step(rig, EIGHT)
    replayed, again = graph.run(step), graph.run(step)
    eager = run_eager(rig, backend, step)
    for row, length in enumerate(EIGHT):  # columns past a row's length are left as they were
        scores = (replayed.scores[row][:, :length], eager.scores[row][:, :length])
        assert length <= BUDGET or torch.equal(*scores)
        assert torch.equal(replayed.kept[row], eager.kept[row])
    assert all(map(torch.equal, replayed.outputs, again.outputs))
    for one, other in zip(replayed.outputs, eager.outputs, strict=True):
        assert relative_error(one, other.float()) <= rig.tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("name", RAGGED)
def test_a_select_layers_attention_has_the_dense_backends_bits(rig: Rig, name: str) -> None:
    fill_cache(rig)
    step = make_step(rig, RAGGED[name])
    outputs = []
    for backend in (rig.use_dense(), rig.use_lim(BUDGET)):
        backend.init_forward_metadata(step.forward_batch)
        outputs.append(run_layers(rig, backend, step)[0].clone())
    assert torch.equal(*outputs)


@pytest.mark.gpu
def test_the_dense_pass_gives_the_scores_where_it_can(rig: Rig, backend: Any) -> None:
    on_tensor_cores = backend.decode_use_tensor_cores
    assert backend.score_source == (DENSE_PASS if on_tensor_cores else SECOND_READING)
    assert backend.decode_use_tensor_cores == (os.environ.get(TENSOR_CORE_VAR) != "false")


@pytest.mark.gpu
def test_a_start_whose_dense_pass_drops_the_last_scores_of_a_row_is_refused(
    rig: Rig, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.scoring is None:
        pytest.skip("scores come from a second reading of K")
    LimAttnBackend(rig.runner)
    run = ScoreStoringAttention.run

    def drop(self: Any, wrapper: Any, *given: Any) -> torch.Tensor:
        output = run(self, wrapper, *given)
        scores, ends = given[3], wrapper._paged_kv_indptr_buf.tolist()
        scores.rows(ends)[0][:, ends[1] - 5 : ends[1]] = torch.nan
        return output

    monkeypatch.setattr(ScoreStoringAttention, "run", drop)
    with pytest.raises(ServerError, match=r"row 0: \d+ of \d+ stored scores are missing"):
        LimAttnBackend(rig.runner)


@pytest.mark.gpu
def test_one_graph_serves_other_lengths_padding_and_other_batch_sizes_between(
    rig: Rig, backend: Any
) -> None:
    graph = Graph(rig, backend, make_step(rig, [1] * 8, seed=1))
    other = Graph(rig, backend, make_step(rig, [1] * 4, seed=2))
    steps: list[tuple[Graph, Callable[[], Step]]] = [
        (graph, lambda: make_step(rig, EIGHT)),
        (graph, lambda: make_step(rig, OTHER_EIGHT, seed=3)),
        (other, lambda: make_step(rig, [900, 20, 256, 1300], seed=4)),
        (graph, lambda: make_step(rig, [800, 257, 3], padding=5, seed=5)),
        (graph, lambda: make_step(rig, [9] * 8, seed=6)),
        (graph, lambda: make_step(rig, EIGHT, seed=7)),
    ]
    for number, (captured, make) in enumerate(steps):
        step = make()
        found = captured.run(step)
        assert not wrong_rows(rig, backend, step, found), number


@pytest.mark.gpu
def test_what_the_scheduler_writes_after_planning_changes_nothing(rig: Rig, backend: Any) -> None:
    graph = Graph(rig, backend, make_step(rig, [1] * 8, seed=1))
    step = make_step(rig, EIGHT)
    graph.plan(step)
    rig.runner.req_to_token_pool.req_to_token[1:9].fill_(7)  # as overlap scheduling may
    graph.replay()
    assert not wrong_rows(rig, backend, step, graph.outcome(step))


@pytest.mark.gpu
def test_chunks_of_rows_keep_the_same_slots(rig: Rig, backend: Any) -> None:
    step = make_step(rig, EIGHT)
    in_one = run_eager(rig, backend, step)
    selector = backend.selector
    # As many rows as a chunk may have, and rows with more tokens than a chunk has room for.
    scores = replace(selector.scores, tokens=max(EIGHT))
    for chunked, rows in ((selector.in_chunks_of(3), 3), (replace(selector, scores=scores), 1)):
        try:
            backend.selector = chunked
            found = run_eager(rig, backend, step)
            assert backend.step_selector.max_rows == rows
        finally:
            backend.selector = selector
        assert all(map(torch.equal, found.kept, in_one.kept))


@pytest.mark.gpu
def test_a_rows_set_does_not_depend_on_its_neighbours(rig: Rig, backend: Any) -> None:
    together = run_eager(rig, backend, make_step(rig, EIGHT))
    step = make_step(rig, EIGHT)
    for row in (2, 3, 6):
        alone = run_eager(rig, backend, only(step, row))
        assert torch.equal(alone.kept[0], together.kept[row])


def only(step: Step, row: int) -> Step:
    """Return a step with one of the rows."""
    one = slice(row, row + 1)
    batch = SimpleNamespace(**vars(step.forward_batch))
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "positions"):
        setattr(batch, name, getattr(batch, name)[one])
    batch.batch_size, batch.seq_lens_sum = 1, int(batch.seq_lens_cpu.sum())
    query, new_kv = (tuple(each[one] for each in pair) for pair in (step.query, step.new_kv))
    return Step(batch, [step.slots[row]], query, new_kv)


def allocations() -> int:
    """Count the allocator's events so far."""
    found: int = torch.cuda.memory_stats()["allocation.all.allocated"]
    return found


@pytest.mark.gpu
def test_beginning_a_step_and_replaying_it_neither_allocate_nor_wait(
    rig: Rig, backend: Any
) -> None:
    graph = Graph(rig, backend, make_step(rig, [1] * 8, seed=1))
    graph.run(make_step(rig, EIGHT))
    step = make_step(rig, OTHER_EIGHT, seed=3)
    torch.cuda.synchronize()
    before = allocations()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.sparse_decode.begin_step(step.forward_batch.seq_lens)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert allocations() == before


@pytest.mark.gpu
@pytest.mark.parametrize("plan_only", [True, False])
def test_an_eager_step_waits_and_allocates_no_more_than_a_dense_one(
    rig: Rig, plan_only: bool
) -> None:
    fill_cache(rig)
    counts = {}
    for name, backend in (("dense", rig.use_dense()), ("lim", rig.use_lim(BUDGET))):
        for lengths in (EIGHT, OTHER_EIGHT):  # the first time loads modules
            step = make_step(rig, lengths)
            torch.cuda.synchronize()
            before = allocations()
            with torch.profiler.profile() as profile:
                backend.init_forward_metadata(step.forward_batch)
                if not plan_only:
                    run_layers(rig, backend, step)
            events = [event.name for event in profile.events()]
            waits = [name for name in events if "Synchronize" in name or "DtoH" in name]
            counts[name] = (allocations() - before, len(waits))
    allocated, waited = (
        lim - dense for lim, dense in zip(counts["lim"], counts["dense"], strict=True)
    )
    assert allocated <= 0
    assert waited <= 0
