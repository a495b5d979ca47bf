"""Timing without a GPU: who runs when, on which metadata, with which layers."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench import timing
from lim_sglang.bench.batch import FilledBatch
from lim_sglang.bench.points import Point, Repeats
from lim_sglang.bench.runner import Contender
from lim_sglang.errors import ServerError
from lim_sglang.schedule import Role

BATCH = FilledBatch(Point(3, 40), torch.empty(0), SimpleNamespace(name="batch"))


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
