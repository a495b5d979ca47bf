"""SGLang's model runner for a benchmark: formats, backends, CUDA graphs, and a filled KV cache.

The end-to-end tests build one in SGLang itself, on a CPU, in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench import model_runner
from lim_sglang.bench.workloads import ModelChoice, Point
from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.config import LimConfig
from lim_sglang.errors import LimError, ServerError
from lim_sglang.policies.policy import Role
from tests.processes import clean_environment
from tests.server.tiny_model import NUM_LAYERS

E4M3 = torch.float8_e4m3fn
EIGHT_BITS = ModelChoice("qwen3-8b", None, "fp8_e4m3", "fp8")
ROWS, COLUMNS, VOCABULARY = 24, 16, 50
POOL_SIZE = 200


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a weight."""
    return torch.zeros(rows, columns, dtype=dtype)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a runner with one quantized layer of 4 heads over 2 KV heads and an fp8 cache."""
    layer = SimpleNamespace(tp_q_head_num=4, tp_k_head_num=2, head_dim=8)
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter([layer]))
    buffer = torch.zeros(30, 2, 8, dtype=torch.uint8)
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, COLUMNS),
        "model.linear.weight": matrix(COLUMNS, ROWS, E4M3),
        "model.linear.weight_scale": matrix(1, ROWS, torch.float32),
        "model.linear.bias": matrix(1, ROWS),
        "model.attention.k_scale": torch.tensor(-1.0),
        "model.attention.v_scale": torch.tensor(-1.0),
        "lm_head.weight": matrix(VOCABULARY, COLUMNS),  # SGLang leaves it in the model's dtype
    }
    return SimpleNamespace(
        model=SimpleNamespace(parameters=weights.values, named_parameters=weights.items),
        token_to_kv_pool=SimpleNamespace(k_buffer=[buffer], v_buffer=[buffer]),
        lim_roles=(Role.FULL,),
        dtype=torch.bfloat16,
        kv_cache_dtype=E4M3,
        page_size=1,
        model_config=SimpleNamespace(context_len=100, quantization="fp8"),
        max_total_num_tokens=29,
    )


def test_facts_count_weights_of_one_byte_and_their_scales(quantized: Any) -> None:
    matrices, scales, rest = ROWS * COLUMNS, 4 * (ROWS + 2), 2 * (VOCABULARY * COLUMNS + ROWS)
    facts = model_runner.model_facts(quantized)
    assert (facts["quantization"], facts["kv_dtype"]) == ("fp8", "torch.float8_e4m3fn")
    assert facts["weight_bytes_by_dtype"] == {
        "torch.float8_e4m3fn": matrices,
        "torch.float32": scales,
        "torch.bfloat16": rest + 2 * VOCABULARY * COLUMNS,  # the embedding
    }
    assert facts["weight_bytes_read"] == matrices + scales + rest
    assert facts["kv_bytes_per_token_and_layer"] == 2 * 2 * 8
    quantized.model_config.quantization = None
    assert model_runner.model_facts(quantized)["quantization"] == "none"


def test_an_untied_embedding_is_not_read_but_a_tied_one_is() -> None:
    weights = {"model.embed_tokens.weight": matrix(5, 5), "model.layers.0.weight": matrix(1, 2)}
    assert model_runner.weight_bytes_read(weights) == 2 * (25 + 2)
    untied = weights | {"lm_head.weight": matrix(5, 5)}
    assert model_runner.weight_bytes_read(untied) == 2 * (25 + 2)


def test_the_chosen_formats_have_to_be_there(quantized: Any) -> None:
    model_runner.check_formats(quantized, EIGHT_BITS)
    model_runner.check_formats(quantized, ModelChoice("qwen3-8b"))  # whatever the checkpoint says
    with pytest.raises(ServerError, match=r"fp8_e5m2 gave a KV cache of torch\.float8_e4m3"):
        model_runner.check_formats(quantized, ModelChoice("qwen3-8b", None, "fp8_e5m2", "fp8"))
    quantized.model = torch.nn.Linear(2, 2)
    with pytest.raises(ServerError, match=r"--quantization fp8 left weights of torch\.float32"):
        model_runner.check_formats(quantized, EIGHT_BITS)


@pytest.mark.parametrize("dummy", [True, False])
def test_random_scales_of_dummy_weights_become_one(
    monkeypatch: pytest.MonkeyPatch, dummy: bool
) -> None:
    names = ("k_scale", "v_scale", "k_scale_float", "v_scale_float")
    plain = SimpleNamespace(**dict.fromkeys(names))
    scales = torch.tensor(5e-4), torch.tensor(5e-4), 5e-4, 5e-4
    scaled = SimpleNamespace(**dict(zip(names, scales, strict=True)))
    fakes = {
        "ServerArgs": lambda **fields: fields,
        "ModelRunner": None,
        "loads_backend": lambda _name: True,
        "attention_layers": lambda _model: iter([plain, scaled]),
        "load_runner": lambda *_: SimpleNamespace(model=None, alloc_memory_pool=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(vars(compat), name, fake)
    ours: Any = SimpleNamespace(LimModelRunner=None)
    monkeypatch.setitem(sys.modules, "lim_sglang.model_runner", ours)
    model_runner.load_runner("folder", backend="flashinfer", dummy=dummy, mem_fraction_static=0.5)
    assert list(map(float, vars(scaled).values())) == [pytest.approx(1.0 if dummy else 5e-4)] * 4
    assert set(vars(plain).values()) == {None}


def test_capacity_is_counted_with_the_budget(
    monkeypatch: pytest.MonkeyPatch, quantized: Any
) -> None:
    monkeypatch.setattr(model_runner, "load_runner", lambda _folder, **_options: quantized)
    monkeypatch.setenv("LIM_CONFIG", "{}")
    assert model_runner.count_slots(EIGHT_BITS, "flashinfer", LimConfig(budget=512), 0.8) == 29
    assert json.loads(os.environ["LIM_CONFIG"])["budget"] == 512


def test_a_backend_without_its_binary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "missing_backend", {"fa3": "no binary"}.get)
    model_runner.check_backends(["flashinfer", "triton"])
    with pytest.raises(LimError, match="--backends fa3: no binary"):
        model_runner.check_backends(["flashinfer", "fa3"])


@pytest.mark.parametrize("serves", [True, False])
def test_kernels_of_layers_are_refused_where_they_do_not_serve(
    monkeypatch: pytest.MonkeyPatch, serves: bool
) -> None:
    monkeypatch.setattr(compat, "missing_backend", {}.get)
    ours: Any = SimpleNamespace(uses_layer_kernels=lambda: serves)
    monkeypatch.setitem(sys.modules, "lim_sglang.model_runner", ours)
    words = r"--backends flashinfer\+layers: our kernels of layers serve on Hopper alone"
    with nullcontext() if serves else pytest.raises(LimError, match=words):
        model_runner.check_backends(["flashinfer", "flashinfer+layers"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triton", ["triton", "SGLang's layers", "triton", "ours"]),
        ("flashinfer+layers", ["flashinfer", "flashinfer"]),
    ],
)
def test_a_dense_backend_is_built_under_its_own_name_and_ours_comes_back(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]
) -> None:
    args = SimpleNamespace(attention_backend="lim", decode_attention_backend="lim")
    args.override = lambda _source, **fields: vars(args).update(fields)
    seen: list[str] = []

    @contextmanager
    def sglang_layers() -> Iterator[None]:
        seen.append("SGLang's layers")
        yield
        seen.append("ours")

    runner = SimpleNamespace(
        server_args=args,
        init_decode_cuda_graph=lambda: seen.append(args.attention_backend),
        sglang_layers=sglang_layers,
    )
    base = SimpleNamespace(
        init_attention_backends=lambda built: seen.append(built.server_args.attention_backend)
    )
    monkeypatch.setitem(vars(compat), "ModelRunner", base)
    model_runner.build_dense_backend(runner, name)
    assert seen == expected
    assert (args.attention_backend, args.decode_attention_backend) == ("lim", None)


@pytest.mark.parametrize(
    ("built", "graphs", "words"),
    [
        ("fa3", "graphs", ""),
        ("flashinfer", "graphs", "built SimpleNamespace for the backend fa3"),
        ("fa3", None, "captured no decode graph for the backend fa3"),
    ],
)
def test_a_backend_is_measured_under_no_others_name(
    monkeypatch: pytest.MonkeyPatch, built: str, graphs: str | None, words: str
) -> None:
    runner, original = SimpleNamespace(), torch.cuda.CUDAGraph

    def build(_runner: Any, _name: str) -> None:
        assert torch.cuda.CUDAGraph.keywords == {"keep_graph": True}  # type: ignore[attr-defined]
        runner.attn_backend = SimpleNamespace(decode_attention_backend_str=built)
        runner.decode_cuda_graph_runner = graphs

    monkeypatch.setattr(model_runner, "build_dense_backend", build)
    with pytest.raises(ServerError, match=words) if words else nullcontext():
        assert model_runner.make_contender(runner, "fa3").graph_runner == "graphs"
    assert torch.cuda.CUDAGraph is original


def test_kernels_are_counted_in_the_graph_of_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver: Any = SimpleNamespace(
        CUgraphNodeType=SimpleNamespace(CU_GRAPH_NODE_TYPE_KERNEL="kernel"),
        CUgraph=lambda init_value: init_value,
        cuGraphGetNodes=lambda graph, num=0: (0, graph[:num], num or len(graph)),
        cuGraphNodeGetType=lambda node: (0, node),
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    graph = SimpleNamespace(raw_cuda_graph=lambda: ["kernel", "memcpy", "kernel"])
    backend = SimpleNamespace(_graphs={"key": graph, "another": None})
    graph_runner = SimpleNamespace(backend=backend, _replay_graph_key="key")
    assert model_runner.count_kernels(model_runner.Contender("lim", "backend", graph_runner)) == 2


class Allocator:
    """Hands out slots from 1 on, as SGLang's."""

    def __init__(self) -> None:
        self.clear()

    def alloc(self, need: int) -> torch.Tensor | None:
        """Return the next slots."""
        if need > len(self.free):
            return None
        taken, self.free = self.free[:need], self.free[need:]
        return taken

    def clear(self) -> None:
        """Free all slots."""
        self.free = torch.arange(1, POOL_SIZE + 1)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the parts of a model runner that a batch is built from."""
    fakes = {
        "ForwardBatch": SimpleNamespace,
        "ForwardMode": SimpleNamespace(DECODE="decode"),
        "CaptureHiddenMode": SimpleNamespace(NULL="none"),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(vars(compat), name, fake)  # the real ones need SGLang
    return SimpleNamespace(
        device="cpu",
        max_total_num_tokens=POOL_SIZE,
        model_config=SimpleNamespace(vocab_size=50, context_len=100),
        spec_algorithm="none",
        page_size=1,
        token_to_kv_pool_allocator=Allocator(),
        req_to_token_pool=SimpleNamespace(
            free_slots=[1, 2, 3, 4], req_to_token=torch.zeros(5, 100, dtype=torch.int32)
        ),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_slot_of_every_layer_is_filled(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(model_runner, "FILL_ROWS", 30)
    store = torch.uint8 if dtype.itemsize == 1 else dtype
    buffers = [torch.zeros(101, 2, 8, dtype=store) for _ in range(4)]
    pool = SimpleNamespace(
        k_buffer=buffers[:2], v_buffer=buffers[2:], dtype=dtype, store_dtype=store
    )
    model_runner.fill_cache(pool, seed=0)
    filled = torch.stack(buffers).view(dtype).float()
    assert filled.isfinite().all()
    assert filled.std() == pytest.approx(1, abs=0.05)
    assert (filled.view(4 * 101, -1).abs().sum(1) > 0).all()
    assert not torch.equal(buffers[0], buffers[1])
    assert not torch.equal(buffers[0][:30], buffers[0][30:60])


@pytest.mark.parametrize("lengths", [(40, 40, 40), (40, 3, 17)], ids=["uniform", "mixed"])
def test_requests_own_scattered_slots_and_write_their_newest_again(
    runner: Any, lengths: tuple[int, ...]
) -> None:
    with model_runner.filled_batch(runner, Point(lengths), seed=0) as batch:
        fields, table = batch.forward_batch, runner.req_to_token_pool.req_to_token
        assert [len(mine) for mine in batch.slots] == list(lengths)
        assert sorted(torch.cat(batch.slots).tolist()) == list(range(1, sum(lengths) + 1))
        assert (batch.slots[0].diff() < 0).any()
        for request, mine in zip(fields.req_pool_indices.tolist(), batch.slots, strict=True):
            assert torch.equal(table[request, : len(mine)].long(), mine)
            assert not table[request, len(mine) :].any()
        assert fields.out_cache_loc.tolist() == [int(mine[-1]) for mine in batch.slots]
        assert fields.seq_lens.tolist() == fields.seq_lens_cpu.tolist() == list(lengths)
        assert fields.positions.tolist() == [length - 1 for length in lengths]
        assert (fields.batch_size, fields.seq_lens_sum) == (3, sum(lengths))
        assert (fields.num_token_non_padded_cpu, fields.req_pool_indices.tolist()) == (3, [1, 2, 3])
        tensors = ("input_ids", "req_pool_indices", "seq_lens", "out_cache_loc", "positions")
        assert {getattr(fields, name).dtype for name in tensors} == {torch.int64}


def test_pages_of_slots_stay_together_in_scattered_order(runner: Any) -> None:
    runner.page_size = 4
    with model_runner.filled_batch(runner, Point((40, 3, 17)), seed=0) as batch:
        taken = torch.cat(batch.slots)
        assert len(taken.unique()) == len(taken) == 60
        for mine in batch.slots:
            first = mine[::4]
            assert torch.equal(mine, (first[:, None] + torch.arange(4)).flatten()[: len(mine)])
            assert ((first - 1) % 4 == 0).all()
        assert (batch.slots[0][::4].diff() < 0).any()


def test_the_slots_are_free_again_after_a_point_and_a_seed_gives_the_same_ones(runner: Any) -> None:
    taken = []
    for _ in range(2):
        with model_runner.filled_batch(runner, Point((60,) * 3), seed=5) as batch:
            assert len(runner.token_to_kv_pool_allocator.free) == POOL_SIZE - 180
        taken.append(torch.cat(batch.slots))
    assert len(runner.token_to_kv_pool_allocator.free) == POOL_SIZE
    assert torch.equal(*taken)


def test_points_without_room_are_refused_all_at_once(runner: Any) -> None:
    words = r"no room for 3x99, 1x5\+1x101: the KV cache has 200 slots, the model .* of 100 tokens"
    with pytest.raises(LimError, match=words):
        model_runner.check_room(runner, [Point((50, 50)), Point((99,) * 3), Point((5, 101))])


def test_a_failure_in_another_process_keeps_its_words() -> None:
    refuse = "from lim_sglang.errors import RefusedError; raise RefusedError(['no such layer'])"
    with pytest.raises(LimError, match="these settings:\n  - no such layer") as caught:
        model_runner._call(exec, (refuse,))
    assert type(caught.value) is LimError  # a RefusedError cannot be pickled
    with pytest.raises(ServerError, match="the process of _exit died"):
        model_runner.run_in_child(os._exit, 3)


SCRIPT = Path(__file__).parent / "in_process.py"
BUDGET = 64
LONG, SHORT, MIXED = "4x1500", "2x50", "1x1500+2x50+1x900"


@pytest.fixture(scope="module")
def shown(tiny_model: Path) -> dict[str, Any]:
    """Return what the script finds in the tiny model."""
    command = [sys.executable, str(SCRIPT), str(tiny_model), str(BUDGET), LONG, SHORT, MIXED]
    done = subprocess.run(
        command,
        env=clean_environment({CPU_ENGINE_VAR: "1"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.e2e
@pytest.mark.parametrize(("point", "sparse_rows"), [(LONG, 4), (SHORT, 0), (MIXED, 2)])
def test_a_filled_context_decodes_as_a_prefilled_one(
    shown: dict[str, Any], point: str, sparse_rows: int
) -> None:
    found = shown["points"][point]
    assert found["finite"]
    assert found["same_again"]  # the length stays, so every window measures the same step
    assert found["sparse_rows"] == sparse_rows
    # Backends are exchanged on one runner; only short rows are as SGLang's own.
    assert found["dense_backend"] == "TorchNativeAttnBackend"
    assert found["attention_backend"] == "lim"
    assert set(found["rows_over"]) | set(found["rows_as_dense"]) == set(range(found["rows"]))
    assert len(found["rows_over"]) == sparse_rows


@pytest.mark.e2e
def test_the_counted_bytes_are_the_models_own(shown: dict[str, Any]) -> None:
    facts = shown["facts"]
    assert facts["quantization"] == "none"
    assert list(facts["weight_bytes_by_dtype"]) == ["torch.float32"]
    assert len(facts["roles"]) == NUM_LAYERS
    assert (facts["heads"], facts["kv_heads"], facts["head_dim"]) == (6, 2, 16)
    assert facts["kv_bytes_per_token_and_layer"] == 2 * 2 * 16 * 4
    per_layer = 64 * 16 * (6 + 2 + 2) + 6 * 16 * 64 + 3 * 64 * 128 + 2 * 16 + 2 * 64
    # Matrices, norms and the output matrix in f32; the embedding is not tied, so not read.
    assert facts["weight_bytes_read"] == 4 * (NUM_LAYERS * per_layer + 64 + 512 * 64)


LOGGED = """
import logging, os, warnings
from lim_sglang.bench.model_runner import run_in_child, show_log
show_log(verbose={verbose})
logging.getLogger("sglang.srt.server_args").warning("SGLANG")
logging.getLogger("sglang.srt.models.registry").warning("REGISTRY")
logging.getLogger("sglang.srt.models.qwen3").warning("UNKNOWN-WEIGHT")
logging.getLogger("sglang.srt.model_loader.loader").warning("LOADER")
logging.getLogger("torch.utils").warning("TORCH")
warnings.warn("IMPORTED")
from transformers.utils import logging as of_transformers
of_transformers.get_logger("transformers.tokens").warning("TRANSFORMERS")
logging.getLogger("lim_sglang.model_runner").warning("OURS")
logging.getLogger("sglang.srt").error("BROKEN")
run_in_child(logging.getLogger("lim_sglang.model_runner").warning, "CHILD")
run_in_child(logging.getLogger("sglang.srt.server_args").warning, "OF-CHILD")
assert "TRANSFORMERS_VERBOSITY" not in os.environ
"""
OF_USE = {"UNKNOWN-WEIGHT", "LOADER", "OURS", "BROKEN", "CHILD"}
OF_OTHERS = {"SGLANG", "REGISTRY", "TORCH", "IMPORTED", "TRANSFORMERS", "OF-CHILD"}


@pytest.mark.parametrize("verbose", [True, False])
def test_the_log_of_others_is_shown_if_it_is_asked_for_or_tells_of_the_model(
    verbose: bool,
) -> None:
    """In a process of its own, since handlers and filters stay."""
    environment = clean_environment({})
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    command = [sys.executable, "-c", LOGGED.format(verbose=verbose)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = {each for each in OF_USE | OF_OTHERS if re.search(rf"\b{each}\b", done.stderr)}
    assert shown == OF_USE | (OF_OTHERS if verbose else set())


def test_bars_are_hidden_unless_the_load_fails(capsys: pytest.CaptureFixture[str]) -> None:
    @model_runner._without_bars()
    def load(text: str, fails: bool) -> None:
        sys.stderr.write(text)
        if fails:
            raise ValueError("no weights")

    load("bar", fails=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="no weights"):
        load("the cause", fails=True)
    assert capsys.readouterr().err == "the cause"
