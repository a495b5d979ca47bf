"""Timing decode steps without a GPU: who runs when, with which layers; the parts of a step."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench import decode, model_runner
from lim_sglang.bench.decode import WARM_UP_STEPS, Bench, DecodeOptions
from lim_sglang.bench.model_runner import Contender, FilledBatch, run_step
from lim_sglang.bench.ranks import Rank
from lim_sglang.bench.results import StepSplit
from lim_sglang.bench.workloads import ModelChoice, Point, SparseReads
from lim_sglang.config import LimConfig
from lim_sglang.errors import ConfigError, LimError, RefusedError, ServerError
from lim_sglang.kernels.bench import Spread
from lim_sglang.policies.policy import Role

POINT = Point((40,) * 3)
BATCH = FilledBatch(POINT, (), SimpleNamespace(name="batch"))
OPTIONS = DecodeOptions(
    ModelChoice("qwen3-8b", None, "fp8_e4m3", "fp8"),
    (POINT,),
    ("lim", "flashinfer"),
    budget=20,
    windows=2,
    steps=4,
)


F, S, R = Role.FULL, Role.SELECT, Role.REUSE
ROLES = (F, S, R, R)


class Runner:
    """Stands in for SGLang's; notes which backend served each step."""

    device = "cpu"
    dtype = torch.float32
    model = None
    lim_roles = ROLES

    def __init__(self, with_graph: bool = True) -> None:
        self.attn_backend: Any = None
        self.decode_cuda_graph_runner: Any = None
        self.served: list[Any] = []
        self._with_graph = with_graph

    def forward(self, forward_batch: Any) -> Any:
        assert forward_batch is BATCH.forward_batch
        self.served.append(self.attn_backend)
        logits = SimpleNamespace(next_token_logits=torch.zeros(3, 5))
        return SimpleNamespace(can_run_graph=self._with_graph, logits_output=logits)


def event(runner: Runner) -> Any:
    """Stand in for a CUDA event; a step takes a millisecond."""
    steps = len(runner.served)
    return SimpleNamespace(
        steps=steps, synchronize=lambda: None, elapsed_time=lambda end: float(end.steps - steps)
    )


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return a runner on which time is counted in steps."""
    runner = Runner()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(decode, "_record_event", lambda: event(runner))
    return runner


def test_backends_take_turns_window_by_window(runner: Runner) -> None:
    contenders = [Contender(name, name, f"graphs of {name}") for name in "ab"]
    found = decode.time_windows(runner, BATCH, contenders, OPTIONS)
    window = 1 + 4  # the first step fills the pipeline and is not timed
    turns = "a" * window + "b" * window
    assert "".join(runner.served) == "a" * WARM_UP_STEPS + "b" * WARM_UP_STEPS + turns * 2
    assert {name: spread.median for name, spread in found.items()} == {"a": 1.0, "b": 1.0}
    assert runner.decode_cuda_graph_runner == "graphs of b"


def test_a_step_without_its_graph_is_no_measurement() -> None:
    with pytest.raises(ServerError, match="without its CUDA graph"):
        run_step(Runner(with_graph=False), BATCH)


def test_an_observed_step_runs_without_its_graph_and_gives_it_back() -> None:
    runner, seen = Runner(with_graph=False), []
    runner.attn_backend, runner.decode_cuda_graph_runner = SimpleNamespace(), "graphs"
    forward = runner.forward

    def observed(batch: Any) -> Any:
        seen.append((runner.attn_backend.observer, runner.decode_cuda_graph_runner))
        return forward(batch)

    runner.forward = observed
    run_step(runner, BATCH, observer="observer")
    assert seen == [("observer", None)]
    assert runner.attn_backend.observer is None
    assert runner.decode_cuda_graph_runner == "graphs"


def test_the_graph_alone_is_replayed_without_a_step(runner: Runner) -> None:
    replayed: list[Any] = []

    def replay(key: str, batch: Any) -> None:
        replayed.append((key, batch))
        runner.served.append("replay")

    backend = SimpleNamespace(replay=replay)
    graphs = SimpleNamespace(backend=backend, _replay_graph_key="key")
    found = decode.time_replays(runner, BATCH, Contender("lim", "lim", graphs), OPTIONS)
    assert replayed == [("key", BATCH.forward_batch)] * 2 * (1 + 4)
    assert (runner.served.count("lim"), found.median) == (1, 1.0)


Metadata = make_dataclass("Metadata", ["decode_wrappers"])
"""Stands in for FlashInfer's."""


class Backend:
    """Notes which layers it ran, and on which wrappers."""

    def __init__(self) -> None:
        self.forward_metadata = Metadata(["of another batch size"])
        self.decode_cuda_graph_metadata = {3: ["of three rows"]}
        self.ran: list[int] = []

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> None:
        assert self.forward_metadata.decode_wrappers == ["of three rows"]
        assert q.shape == (3, 8)
        assert (k, v, save_kv_cache) == (None, None, False)
        assert forward_batch is BATCH.forward_batch
        self.ran.append(layer.layer_id)


@pytest.fixture
def four_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model have four layers, and graphs run at once and take 6 ms."""
    layers = [SimpleNamespace(layer_id=n, tp_q_head_num=2, head_dim=4) for n in range(4)]
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter(layers))
    monkeypatch.setattr(decode, "capture", lambda run: run())
    monkeypatch.setattr(decode, "time_graph", lambda *_: [6.0, 6.0])


@pytest.mark.usefixtures("four_layers")
def test_each_role_is_timed_on_its_layers_and_divided_by_their_number() -> None:
    backend = Backend()
    lim = Contender("lim", backend, None)
    found = decode.time_layers(Runner(), BATCH, lim, ROLES, lambda: None)
    assert backend.ran == [0, 1, 2, 3]
    assert found == {F: 6.0, S: 6.0, R: 3.0}


@pytest.mark.usefixtures("four_layers")
def test_the_live_metadata_is_put_back_even_after_a_failure() -> None:
    backend = Backend()
    planned = backend.forward_metadata
    backend.forward_decode = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        decode.time_layers(Runner(), BATCH, Contender("lim", backend, None), ROLES, lambda: None)
    assert backend.forward_metadata is planned


@pytest.mark.parametrize(
    ("roles", "layer_ms", "expected"),
    [
        ((F, F, S, R, R, R), {F: 0.5, S: 0.75, R: 0.25}, StepSplit(1.5, 0.25, 0.75, 7.5)),
        ((F, F, F, F), {F: 0.5}, StepSplit(2.0, 0.0, 0.0, 8.0)),
        # Without a FULL layer selection cannot be told from attention.
        ((S, R), {S: 1.0, R: 0.5}, StepSplit(1.0, 0.0, 0.5, 8.5)),
    ],
)
def test_a_step_divides_by_role(
    roles: tuple[Role, ...], layer_ms: dict[Role, float], expected: StepSplit
) -> None:
    assert decode.split_step(10.0, roles, layer_ms) == expected


@pytest.mark.parametrize(
    ("name", "num_bytes", "sparse_rows", "split"),
    [
        ("lim", 1000 + 3 * 10 * (40 * 2 + 20 * 2), 2, StepSplit(1.0, 0.0, 1.0, 6.0)),
        ("flashinfer", 1000 + 3 * 10 * 40 * 4, None, StepSplit(2.0, 0.0, 0.0, 6.0)),
        ("triton", 1000 + 3 * 10 * 40 * 4, None, None),
    ],
)
def test_a_row_has_the_limit_and_the_parts_of_its_own_backend(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    num_bytes: int,
    sparse_rows: int | None,
    split: StepSplit | None,
) -> None:
    spread = Spread(8.0, 8.0, 8.0)
    monkeypatch.setitem(vars(compat), "FlashInferAttnBackend", Backend)
    monkeypatch.setattr(decode, "time_replays", lambda *_: spread)
    monkeypatch.setattr(decode, "time_layers", lambda *given: dict.fromkeys(set(given[3]), 0.5))
    monkeypatch.setattr(model_runner, "count_kernels", lambda contender: len(contender.name))
    conditions = {
        "weight_bytes_read": 1000,
        "kv_bytes_per_token_and_layer": 10,
        "roles": [role.value for role in ROLES],
        "copy_gb_per_s": 1e-6,
    }
    reads = SparseReads(num_layers=2, tokens=60.0)
    monkeypatch.setattr(decode, "sparse_reads", lambda *_: reads)
    runner = Runner()
    runner.lim_policy = "sparse"
    bench = Bench(OPTIONS, runner, [], conditions, lambda: None)
    backend = "triton's" if name == "triton" else Backend()
    row = bench.row(BATCH, Contender(name, backend, None), spread, sparse_rows)
    assert (row.tokens_read, row.dense_layers) == ((None, None) if num_bytes > 5000 else (20.0, 2))
    assert (row.num_bytes, row.sparse_rows, row.split) == (num_bytes, sparse_rows, split)
    assert row.limit_share == num_bytes / 8.0
    assert (row.point, row.backend, row.kernel_launches) == (POINT, name, len(name))


def test_a_point_is_summarized_for_each_backend_before_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(model_runner, "filled_batch", lambda *_: nullcontext(BATCH))
    monkeypatch.setattr(model_runner, "summarize_rows", lambda *given: done.append(given[1].name))
    monkeypatch.setattr(decode, "require_exact_steps", lambda *_: done.append("steps") or {})
    monkeypatch.setattr(decode, "time_windows", lambda *_: {"lim": 1, "quest": 2})
    monkeypatch.setattr(Bench, "row", lambda *given: given[2].name)
    contenders = [Contender(name, None, None) for name in ("lim", "quest")]
    rows: Any = Bench(OPTIONS, Runner(), contenders, {}, lambda: None).measure(POINT)
    assert rows == ["lim", "quest"]
    assert done == ["lim", "quest", "steps"]


def test_the_model_is_loaded_in_the_chosen_formats_after_the_kernels_are_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []

    def load(_folder: str, **options: Any) -> None:
        done.append(options)
        raise ServerError("enough")

    monkeypatch.setattr(decode, "require_gpu", lambda: None)
    monkeypatch.setattr(decode, "require_exact_kernels", lambda: done.append("exact"))
    monkeypatch.setattr(model_runner, "check_policies", lambda *_: done.append("policies"))
    monkeypatch.setattr(model_runner, "load_runner", load)
    monkeypatch.setattr(compat, "missing_backend", lambda _name: None)
    monkeypatch.setenv("LIM_CONFIG", "{}")
    with pytest.raises(ServerError, match="enough"):
        next(decode.measure(OPTIONS, done.append))
    assert done[:3] == ["Checking the kernels on this GPU", "exact", "policies"]
    chosen = {"backend": "lim", "mem_fraction_static": 0.88, "batch_sizes": [3], "rank": Rank()}
    formats = {"dummy": True, "kv_cache_dtype": "fp8_e4m3", "quantization": "fp8"}
    assert done[-1] == chosen | formats | {"context_length": None}
    with pytest.raises(ServerError, match="enough"):
        next(decode.measure(replace(OPTIONS, context_limit=131_072), done.append))
    assert done[-1]["context_length"] == 131_072


def test_ranks_are_started_once_they_can_share_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def run_ranks(function: Any, args: Any, size: int, *_: Any) -> Iterator[str]:
        started.append((function, args[0], Path(args[1], "config.json").exists(), size))
        yield "row"

    monkeypatch.setattr(decode, "require_gpu", lambda: None)
    monkeypatch.setattr(decode, "run_ranks", run_ranks)
    monkeypatch.setattr(model_runner, "visible_gpus", lambda: ["0", "1", "2"])
    monkeypatch.setenv("LIM_CONFIG", "{}")
    two = replace(OPTIONS, tp=2)
    shown: list[str] = []
    with pytest.raises(RefusedError, match=r"--tp 2: .* not been verified on several GPUs"):
        list(decode.measure(two, shown.append))
    monkeypatch.setattr(model_runner, "reasons_against", lambda _options, **_: [])
    assert list(decode.measure(two, shown.append)) == ["row"]
    assert started == [(decode.measure_rank, two, True, 2)]
    assert shown == ["Starting 2 ranks"]
    for number, words in ((3, "--tp 3: 3 ranks cannot share 32 query heads"), (4, "found 3")):
        with pytest.raises(LimError, match=words):
            list(decode.measure(replace(OPTIONS, tp=number), shown.append))
    assert len(started) == 1


@pytest.mark.parametrize(("number", "size"), [(0, 1), (0, 2), (1, 2)])
def test_each_rank_measures_on_its_own_gpu_with_keys_of_its_own(
    monkeypatch: pytest.MonkeyPatch, number: int, size: int
) -> None:
    done: dict[str, Any] = {}

    def load(_folder: str, **options: Any) -> Any:
        done["rank"] = options["rank"]
        return SimpleNamespace(token_to_kv_pool="pool")

    made = SimpleNamespace(take_over=lambda _runner: None)
    rank, options = Rank(number, size), replace(OPTIONS, points=(), tp=size)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: done.update(gpu=gpu))
    monkeypatch.setattr(decode, "prepare", lambda *_: (LimConfig(), [3]))
    monkeypatch.setattr(decode, "make_contenders", lambda *_: [made])
    monkeypatch.setattr(decode, "copy_gb_per_s", lambda: 1.0)
    monkeypatch.setattr(decode, "cache_flush", lambda: None)
    for name in ("check_policies", "check_formats", "check_room"):
        monkeypatch.setattr(model_runner, name, lambda *_: None)
    monkeypatch.setattr(model_runner, "model_facts", lambda _runner: {})
    monkeypatch.setattr(model_runner, "load_runner", load)
    monkeypatch.setattr(model_runner, "fill_cache", lambda *given: done.update(filled=given))
    monkeypatch.setattr(decode, "Bench", lambda *given: done.update(conditions=given[3]))
    assert list(decode.measure_rank(options, "folder", lambda _: None, rank)) == []
    assert (done["rank"], done["filled"]) == (rank, ("pool", number))
    assert done.get("gpu") == (number if size > 1 else None)
    assert done["conditions"]["tp"] == size
    assert ("bytes, heads" in " ".join(done["conditions"]["notes"])) == (size > 1)


def test_a_limit_below_the_longest_request_is_refused() -> None:
    assert replace(OPTIONS, context_limit=40).context_limit == 40
    with pytest.raises(ConfigError, match="--context-limit 39 is less than the 40 tokens"):
        replace(OPTIONS, context_limit=39)
