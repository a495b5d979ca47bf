"""Weights and KV caches in eight bits: what is loaded, what is counted, what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Module, Parameter

from lim_sglang import compat
from lim_sglang.bench import capacity, decode
from lim_sglang.bench import runner as runner_module
from lim_sglang.bench.decode import asked, set_up
from lim_sglang.bench.facts import model_facts, traffic_of
from lim_sglang.bench.points import DecodeOptions, ModelChoice, Point, Precision, Repeats
from lim_sglang.bench.runner import check_precision, drop_dummy_scales, load_runner
from lim_sglang.config import LimConfig, Role
from lim_sglang.errors import ServerError

E4M3 = torch.float8_e4m3fn
EIGHT_BITS = Precision("fp8_e4m3", "fp8")
ROWS, COLUMNS, VOCABULARY = 24, 16, 50


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Parameter:
    """A weight."""
    return Parameter(torch.zeros(rows, columns, dtype=dtype), requires_grad=False)


def scale(*shape: int) -> Parameter:
    """Of a weight, or of K or V."""
    return Parameter(torch.full(shape, -1.0), requires_grad=False)


def quantized_model() -> Module:
    """One layer as SGLang leaves it after `process_weights_after_loading`."""
    linear, attention, whole = Module(), Module(), Module()
    linear.weight = Parameter(matrix(ROWS, COLUMNS, E4M3).t(), requires_grad=False)
    linear.weight_scale = scale(1, ROWS)
    linear.bias = matrix(1, ROWS)
    attention.k_scale, attention.v_scale = scale(), scale()
    whole.model = Module()
    whole.model.embed_tokens, whole.lm_head = Module(), Module()
    whole.model.embed_tokens.weight = matrix(VOCABULARY, COLUMNS)
    whole.lm_head.weight = matrix(VOCABULARY, COLUMNS)  # SGLang leaves it in the model's dtype
    whole.model.linear, whole.model.attention = linear, attention
    return whole


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner with one quantized layer of 4 heads over 2 KV heads, and an fp8 cache of bytes."""
    layer = SimpleNamespace(tp_q_head_num=4, tp_k_head_num=2, head_dim=8)
    monkeypatch.setattr(compat, "attention_layers", lambda _model: iter([layer]))
    buffer = torch.zeros(30, 2, 8, dtype=torch.uint8)
    return SimpleNamespace(
        model=quantized_model(),
        token_to_kv_pool=SimpleNamespace(k_buffer=[buffer], v_buffer=[buffer]),
        lim_roles=(Role.FULL,),
        dtype=torch.bfloat16,
        kv_cache_dtype=E4M3,
        page_size=1,
        model_config=SimpleNamespace(context_len=100, quantization="fp8"),
        max_total_num_tokens=29,
    )


MATRICES = ROWS * COLUMNS  # one byte each
SCALES = 4 * (ROWS + 2)
REST = 2 * (VOCABULARY * COLUMNS + ROWS)


def test_a_step_reads_weights_of_one_byte_and_their_scales(runner: Any) -> None:
    traffic = traffic_of(runner)
    assert traffic.weight_bytes == MATRICES + SCALES + REST
    assert traffic.token_bytes == 2 * 2 * 8


def test_the_facts_tell_what_the_weights_and_the_cache_are(runner: Any) -> None:
    facts = model_facts(runner, traffic_of(runner))
    assert (facts["quantization"], facts["kv_dtype"]) == ("fp8", "torch.float8_e4m3fn")
    assert facts["weight_bytes_by_dtype"] == {
        "torch.float8_e4m3fn": MATRICES,
        "torch.float32": SCALES,
        "torch.bfloat16": REST + 2 * VOCABULARY * COLUMNS,  # the embedding
    }
    runner.model_config.quantization = None
    assert model_facts(runner, traffic_of(runner))["quantization"] == "none"


def test_what_was_asked_for_has_to_be_there(runner: Any) -> None:
    check_precision(runner, EIGHT_BITS)
    check_precision(runner, Precision())  # whatever the checkpoint says
    with pytest.raises(ServerError, match=r"fp8_e5m2 gave a KV cache of torch\.float8_e4m3"):
        check_precision(runner, Precision("fp8_e5m2", "fp8"))
    runner.model = torch.nn.Linear(2, 2)
    with pytest.raises(ServerError, match=r"--quantization fp8 left weights of torch\.float32"):
        check_precision(runner, EIGHT_BITS)


def test_scales_that_were_drawn_with_dummy_weights_become_one() -> None:
    plain = SimpleNamespace(k_scale=None, v_scale=None, k_scale_float=None, v_scale_float=None)
    drawn = SimpleNamespace(
        k_scale=scale(), v_scale=scale(), k_scale_float=5e-4, v_scale_float=5e-4
    )
    drop_dummy_scales([plain, drawn])
    assert plain.k_scale_float is plain.v_scale_float is None
    assert drawn.k_scale_float == drawn.v_scale_float == 1.0
    assert float(drawn.k_scale) == float(drawn.v_scale) == 1.0


@pytest.mark.parametrize("dummy", [True, False])
def test_only_dummy_models_lose_their_scales(monkeypatch: pytest.MonkeyPatch, dummy: bool) -> None:
    layer = SimpleNamespace(k_scale=scale(), v_scale=scale(), k_scale_float=0.5, v_scale_float=0.5)
    fakes = {
        "ServerArgs": lambda **fields: fields,
        "ModelRunner": None,
        "loads_backend": lambda _name: True,
        "attention_layers": lambda _model: iter([layer]),
        "load_runner": lambda *_: SimpleNamespace(model=None, alloc_memory_pool=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(vars(compat), name, fake)
    load_runner("folder", backend="flashinfer", dummy=dummy, mem_fraction_static=0.5)
    assert layer.k_scale_float == (1.0 if dummy else 0.5)


OPTIONS = DecodeOptions(
    ModelChoice("qwen3-8b", None),
    (Point.uniform(1, 5000),),
    ("lim", "flashinfer"),
    Repeats(),
    2048,
    0.88,
    EIGHT_BITS,
)


class LoadedError(Exception):
    """Ends a start once it is known what was asked of SGLang."""


def test_both_commands_load_every_backend_in_the_formats_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[dict[str, Any]] = []

    def load(_folder: str, **options: Any) -> None:
        loads.append(options)
        raise LoadedError

    for name in ("require_gpu", "check_backends", "check_exactness"):
        monkeypatch.setattr(decode, name, lambda *_: None)
    monkeypatch.setattr("lim_sglang.bench.gate.require_gpu", lambda: None)
    monkeypatch.setattr(decode, "load_runner", load)
    monkeypatch.setattr(runner_module, "load_runner", load)
    monkeypatch.setenv("LIM_CONFIG", "{}")
    with pytest.raises(LoadedError), set_up(OPTIONS, lambda _text: None):
        pass
    for backend in OPTIONS.backends:
        with pytest.raises(LoadedError):
            capacity._count_slots(OPTIONS.model, backend, 2048, 0.88, EIGHT_BITS)
    assert [each["backend"] for each in loads] == ["lim", "lim", "flashinfer"]
    for each in loads:
        assert (each["kv_cache_dtype"], each["quantization"]) == ("fp8_e4m3", "fp8")


def test_the_conditions_say_what_was_asked_for() -> None:
    assert asked(OPTIONS, LimConfig())["kv_cache_dtype"] == "fp8_e4m3"
    assert OPTIONS.title == "qwen3-8b, weights fp8, KV cache fp8_e4m3"
