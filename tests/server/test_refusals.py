"""What is refused, and that reasons come all at once."""

from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang.config import LimConfig, Role
from lim_sglang.validation import (
    CPU_REFUSALS,
    REFUSALS,
    Refusal,
    decodes_with_lim,
    reasons_against,
    reasons_against_layers,
    reasons_against_model,
    reuses_sets,
)

BAD_VALUES: dict[str, Any] = {
    "disaggregation_mode": "decode",
    "speculative_algorithm": "EAGLE",
    "dllm_algorithm": "LowConfidence",
    "kv_cache_dtype": "fp4_e2m1",
    "cuda_graph_backend_decode": "breakable",
    "tp_size": 2,
    "pp_size": 2,
    "dcp_size": 2,
    "attn_cp_size": 2,
    "cuda_graph_config": {"decode": {"backend": "breakable"}},
    "page_size": 16,
}


def model(**traits: Any) -> SimpleNamespace:
    """A plain dense decoder-only configuration with some traits changed."""
    shape = {
        "model_type": "qwen3",
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    return SimpleNamespace(**(shape | traits))


@pytest.mark.parametrize("refusal", REFUSALS + CPU_REFUSALS, ids=lambda r: r.option)
def test_each_option_is_refused_by_name(refusal: Refusal) -> None:
    options = SimpleNamespace(**{refusal.field: BAD_VALUES.get(refusal.field, True)})
    (reason,) = reasons_against(options, on_cpu=True)
    assert reason.startswith(refusal.option)
    assert refusal.why in reason


def test_default_options_are_served() -> None:
    defaults = SimpleNamespace(
        tp_size=1,
        pp_size=1,
        page_size=None,
        disaggregation_mode="null",
        kv_cache_dtype="auto",
        cuda_graph_backend_decode=None,
        enable_mixed_chunk=False,
    )
    assert reasons_against(defaults, on_cpu=True) == []


def test_pages_of_several_tokens_are_refused_on_a_cpu_only() -> None:
    assert reasons_against(SimpleNamespace(page_size=16), on_cpu=False) == []


@pytest.mark.parametrize(
    ("graphs", "refused"),
    [
        ({"decode": {"backend": "breakable"}}, True),
        ({"decode": {"backend": "full"}, "prefill": {"backend": "breakable"}}, False),
        ({"decode": {"max_bs": 8}}, False),
        (SimpleNamespace(decode=SimpleNamespace(backend="tc_piecewise")), True),
        (SimpleNamespace(decode=SimpleNamespace(backend="full")), False),
    ],
)
def test_a_decode_graph_in_pieces_is_refused_as_typed_and_as_resolved(
    graphs: object, refused: bool
) -> None:
    reasons = reasons_against(SimpleNamespace(cuda_graph_config=graphs), on_cpu=False)
    assert [r.split(":")[0] for r in reasons] == ["--cuda-graph-config"] * refused


@pytest.mark.parametrize("dtype", ["mxfp8", "nvfp4", "fp4_mx_block16", "fp4_e2m1", "int8"])
def test_a_cache_with_scales_beside_its_keys_is_refused(dtype: str) -> None:
    (reason,) = reasons_against(SimpleNamespace(kv_cache_dtype=dtype), on_cpu=False)
    assert reason.startswith(f"--kv-cache-dtype {dtype}: ")


@pytest.mark.parametrize("dtype", ["auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2", None])
def test_a_cache_that_holds_keys_alone_is_served(dtype: str | None) -> None:
    assert reasons_against(SimpleNamespace(kv_cache_dtype=dtype), on_cpu=False) == []


def test_all_reasons_come_at_once() -> None:
    options = SimpleNamespace(pp_size=2, enable_mixed_chunk=True, tp_size=4)
    assert len(reasons_against(options, on_cpu=False)) == 3


@pytest.mark.parametrize(
    ("traits", "word"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"sliding_window": 4096}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "hybrid"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"attention_chunk_size": 8192}, "chunked"),
    ],
)
def test_a_model_is_refused_by_its_trait(traits: dict[str, Any], word: str) -> None:
    (reason,) = reasons_against_model(model(**traits), LimConfig())
    assert word in reason


@pytest.mark.parametrize(
    "traits",
    [{}, {"sliding_window": 4096, "layer_types": ["full_attention"] * 8}, {"kv_lora_rank": None}],
)
def test_a_plain_model_is_served(traits: dict[str, Any]) -> None:
    assert reasons_against_model(model(**traits), LimConfig()) == []


@pytest.mark.parametrize(
    ("settings", "reuses"),
    [
        ({}, True),
        ({"policy": "full"}, False),
        ({"select_layers": ()}, False),
        ({"select_layers": (7,)}, False),  # of 8: nothing above it
    ],
)
def test_a_schedule_reuses_sets_unless_all_its_layers_read_everything(
    settings: dict[str, Any], reuses: bool
) -> None:
    assert reuses_sets(model(), LimConfig(**settings)) is reuses


def test_a_layer_that_the_model_lacks_is_a_reason() -> None:
    (reason,) = reasons_against_model(model(), LimConfig(select_layers=(2, 30)))
    assert "layer 30" in reason


def layer(index: int, **traits: Any) -> SimpleNamespace:
    """A plain attention layer with some traits changed."""
    plain = {"sliding_window_size": -1, "is_cross_attention": False, "logit_cap": 0.0}
    return SimpleNamespace(layer_id=index, **(plain | traits))


def test_loaded_layers_are_checked_again() -> None:
    rank, mass = LimConfig(), LimConfig(ranking="mass")

    def reasons(layers: list, depth: int, config: LimConfig = rank, *, on_cpu: bool = True) -> list:
        roles = (Role.SELECT, Role.REUSE)[:depth]
        return reasons_against_layers(layers, roles, config, on_cpu=on_cpu)

    assert reasons([layer(0), layer(1)], 2) == []
    assert reasons([layer(0)], 2)
    assert reasons([layer(0, sliding_window_size=128)], 1)
    assert reasons([layer(0, is_cross_attention=True)], 1)
    assert reasons([layer(0, logit_cap=30.0)], 1)
    assert reasons([layer(0, logit_cap=30.0)], 1, on_cpu=False) == []
    capped = [layer(0, logit_cap=30.0), layer(1)]
    assert reasons(capped, 2, on_cpu=False) == []
    assert len(reasons(capped, 2, mass, on_cpu=False)) == 1
    assert reasons([layer(0), layer(1)], 2, mass) == []


@pytest.mark.parametrize(
    ("both", "decode", "ours"),
    [("lim", None, True), ("fa3", "lim", True), ("lim", "fa3", False), (None, None, False)],
)
def test_the_decode_backend_decides(both: str | None, decode: str | None, ours: bool) -> None:
    options = SimpleNamespace(attention_backend=both, decode_attention_backend=decode)
    assert decodes_with_lim(options) is ours
