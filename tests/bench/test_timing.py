"""Timing without a GPU: who runs when, on which metadata, with which layers."""

import sys
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lim_sglang import compat
from lim_sglang.bench import launches, timing
from lim_sglang.bench.batch import FilledBatch
from lim_sglang.bench.points import Point, Repeats
from lim_sglang.bench.runner import Contender
from lim_sglang.config import Role
from lim_sglang.errors import ServerError
from lim_sglang.kernels import bench

BATCH = FilledBatch(Point.uniform(3, 40), (), SimpleNamespace(name="batch"))


class Runner:
    """Stands in for SGLang's: notes which backend served each step."""

    device = "cpu"
    dtype = torch.float32
    model = None

    def __init__(self, with_graph: bool = True) -> None:
        self.attn_backend: Any = None
        self.decode_cuda_graph_runner: Any = None
        self.served: list[Any] = []
        self._with_graph = with_graph

    def forward(self, forward_batch: Any) -> Any:
        """One step."""
        assert forward_batch is BATCH.forward_batch
        assert self.decode_cuda_graph_runner == f"graphs of {self.attn_backend}"
        self.served.append(self.attn_backend)
        logits = SimpleNamespace(next_token_logits=torch.zeros(3, 5))
        return SimpleNamespace(can_run_graph=self._with_graph, logits_output=logits)


class Mark:
    """Stands in for a CUDA event; a step takes a millisecond."""

    def __init__(self, runner: Runner) -> None:
        self._steps = len(runner.served)

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: "Mark") -> float:
        """Steps between two marks."""
        return float(end._steps - self._steps)


def contender(name: str) -> Contender:
    """A backend that is only a name."""
    return Contender(name, name, f"graphs of {name}")


def test_backends_take_turns_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_mark", lambda: Mark(runner))
    found = timing.time_windows(
        runner, BATCH, [contender("a"), contender("b")], Repeats(windows=2, steps=4)
    )
    warm = timing.WARM_UP_STEPS
    window = 1 + 4  # the first step fills the pipeline and is not timed
    turns = "a" * window + "b" * window
    assert "".join(runner.served) == "a" * warm + "b" * warm + turns * 2
    assert {name: spread.median for name, spread in found.items()} == {"a": 1.0, "b": 1.0}


def test_a_step_without_its_graph_is_no_measurement() -> None:
    runner = Runner(with_graph=False)
    contender("a").take_over(runner)
    with pytest.raises(ServerError, match="without its CUDA graph"):
        timing.run_step(runner, BATCH)


@dataclass
class Metadata:
    """As FlashInfer's."""

    decode_wrappers: list[str]


class Backend:
    """Notes which layers it ran, and on which wrappers."""

    def __init__(self) -> None:
        self.forward_metadata = Metadata(["of another batch size"])
        self.decode_cuda_graph_metadata = {3: ["of three rows"]}
        self.ran: list[int] = []

    def __str__(self) -> str:
        return "backend"

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> None:
        """One layer."""
        assert self.forward_metadata.decode_wrappers == ["of three rows"]
        assert q.shape == (3, 8)
        assert (k, v, save_kv_cache) == (None, None, False)
        assert forward_batch is BATCH.forward_batch
        self.ran.append(layer.layer_id)


@pytest.fixture
def four_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of four layers, and graphs that run at once and take 6 ms."""
    layers = [SimpleNamespace(layer_id=n, tp_q_head_num=2, head_dim=4) for n in range(4)]
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter(layers))
    monkeypatch.setattr(timing, "capture", lambda run: run())
    monkeypatch.setattr(timing, "time_graph", lambda *_: [6.0, 6.0])


ROLES = (Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE)


@pytest.mark.usefixtures("four_layers")
def test_each_role_is_timed_on_its_layers_and_divided_by_their_number() -> None:
    backend = Backend()
    chosen = Contender("lim", backend, "graphs of backend")
    found = timing.time_layers(Runner(), BATCH, chosen, ROLES, lambda: None)
    assert backend.ran == [0, 1, 2, 3]
    assert found == {Role.FULL: 6.0, Role.SELECT: 6.0, Role.REUSE: 3.0}


@pytest.mark.usefixtures("four_layers")
def test_the_live_metadata_is_put_back_even_after_a_failure() -> None:
    backend = Backend()
    planned = backend.forward_metadata
    backend.forward_decode = None  # type: ignore[assignment, method-assign]
    chosen = Contender("lim", backend, "graphs of backend")
    with pytest.raises(TypeError):
        timing.time_layers(Runner(), BATCH, chosen, ROLES, lambda: None)
    assert backend.forward_metadata is planned


def test_the_graph_alone_is_replayed_without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    replayed: list[tuple[Any, Any]] = []
    graphs = SimpleNamespace(
        backend=SimpleNamespace(replay=lambda key, batch: replayed.append((key, batch))),
        _replay_graph_key="key",
    )
    monkeypatch.setattr(
        runner,
        "forward",
        lambda _batch: SimpleNamespace(
            can_run_graph=True, logits_output=SimpleNamespace(next_token_logits=torch.zeros(1))
        ),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_mark", lambda: Mark(runner))
    chosen = Contender("lim", "backend", graphs)
    timing.time_replays(runner, BATCH, chosen, Repeats(windows=2, steps=3))
    assert replayed == [("key", BATCH.forward_batch)] * 2 * (1 + 3)


class NodeType(Enum):
    """As CUDA's driver API."""

    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMCPY = 1
    CU_GRAPH_NODE_TYPE_GRAPH = 4


KERNEL, COPY = NodeType.CU_GRAPH_NODE_TYPE_KERNEL, NodeType.CU_GRAPH_NODE_TYPE_MEMCPY


class Code(int):
    """An error code with a name."""

    name = "CUDA_ERROR_INVALID_VALUE"


@dataclass
class Driver:
    """Stands in for `cuda.bindings.driver`: a graph is a list of nodes, one within it a node."""

    error: Code = field(default_factory=Code)
    CUgraphNodeType = NodeType
    CUgraph = staticmethod(lambda init_value: init_value)

    def cuGraphGetNodes(self, graph: Any, num_nodes: int = 0) -> Any:  # noqa: N802 - CUDA's name
        """The number of nodes, and as many as there is room for."""
        return self.error, graph[:num_nodes], num_nodes or len(graph)

    def cuGraphNodeGetType(self, node: Any) -> Any:  # noqa: N802 - CUDA's name
        """What a node is."""
        return self.error, NodeType.CU_GRAPH_NODE_TYPE_GRAPH if isinstance(node, list) else node

    def cuGraphChildGraphNodeGetGraph(self, node: Any) -> Any:  # noqa: N802 - CUDA's name
        """The graph within a node."""
        return self.error, node


def replayed(graph: Any) -> Contender:
    """A contender whose last step replayed a graph."""
    backend = SimpleNamespace(_graphs={"key": graph, "another": None})
    graph_runner = SimpleNamespace(backend=backend, _replay_graph_key="key")
    return Contender("lim", "backend", graph_runner)


def test_kernels_are_counted_in_the_graph_and_in_those_within_it() -> None:
    assert launches.count_nodes(Driver(), [KERNEL, COPY, [KERNEL, [KERNEL], COPY], KERNEL]) == 4
    assert launches.count_nodes(Driver(), []) == 0


def test_the_graph_of_the_last_step_is_the_one_that_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver: Any = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    graph = SimpleNamespace(raw_cuda_graph=lambda: [KERNEL, KERNEL, COPY])
    assert timing.count_launches(replayed(graph)) == 2


@pytest.mark.parametrize("error", [RuntimeError("not kept"), ImportError("no cuda-python")])
def test_kernels_that_cannot_be_counted_cost_no_time_but_are_mentioned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(_graph: Any) -> int:
        raise error

    monkeypatch.setattr(timing, "count_kernels", fail)
    assert timing.count_launches(replayed("graph")) is None
    assert f"lim: its kernels cannot be counted: {error}" in caplog.text


def test_the_driver_s_refusal_is_told_in_its_words() -> None:
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        launches.count_nodes(Driver(Code(1)), [KERNEL])


def test_graphs_that_sglang_captures_can_be_listed_and_others_are_torch_s() -> None:
    original = torch.cuda.CUDAGraph

    def fail() -> None:
        with launches.listed_graphs():
            assert torch.cuda.CUDAGraph is launches.ListedGraph
            assert issubclass(torch.cuda.CUDAGraph, original)
            raise ServerError("out of memory")

    with pytest.raises(ServerError):
        fail()
    assert torch.cuda.CUDAGraph is original


@pytest.mark.parametrize(
    ("free", "measured"), [(1000, [100, 200, 400]), (500, [100, 200]), (10, [100])]
)
def test_the_copy_s_bandwidth_is_the_best_of_the_sizes_that_fit(
    monkeypatch: pytest.MonkeyPatch, free: int, measured: list[int]
) -> None:
    sizes: list[int] = []

    def take_ms(num_bytes: int, _device: str) -> float:
        sizes.append(num_bytes)
        return 1e-4 if num_bytes == 100 else 1e-3

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "_median_copy_ms", take_ms)
    assert bench.copy_gb_per_s((100, 200, 400)) == pytest.approx(2 * 100 / 1e-4 / 1e6)
    assert sizes == measured


class Operations(TorchDispatchMode):
    """Notes which of torch's operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_copy_that_is_timed_is_no_memcpy(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = Operations()

    def capture(run: Any) -> None:
        with operations:
            run()

    monkeypatch.setattr(bench, "capture", capture)
    monkeypatch.setattr(bench, "time_graph", lambda _graph, _repeats: [3.0, 1.0, 9.0])
    assert bench._median_copy_ms(4096, "cpu") == 3.0
    assert operations.names == ["aten.neg.out"]
