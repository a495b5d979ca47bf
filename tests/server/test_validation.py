"""Refusals: SGLang options, models, layers and GPUs, all reasons at once, before anything loads."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang.config import LimConfig
from lim_sglang.policies.lessismore import LessIsMore
from lim_sglang.policies.lossless import Lossless
from lim_sglang.policies.policy import Role
from lim_sglang.validation import (
    CPU_REFUSALS,
    GPU_REFUSALS,
    LATER_REFUSALS,
    REFUSALS,
    Gpu,
    Refusal,
    decodes_with_lim,
    has_nvcc,
    head_dim_of,
    model_shape,
    model_traits,
    reads_sparsely,
    reasons_against,
    reasons_against_gpu,
    reasons_against_kv_cache,
    reasons_against_layers,
    reasons_against_model,
    reasons_against_ranks,
    reasons_against_selection,
)

LIMITS_MD = Path(__file__).parents[2] / "docs" / "limits.md"
BAD_VALUES: dict[str, Any] = {
    "disaggregation_mode": "decode",
    "speculative_algorithm": "EAGLE",
    "dllm_algorithm": "LowConfidence",
    "kv_cache_dtype": "fp4_e2m1",
    "cuda_graph_backend_decode": "breakable",
    "tokenizer_worker_num": 2,
    "grammar_backend": "xgrammar",
    "tp_size": 2,
    "ep_size": 2,
    "nnodes": 2,
    "pp_size": 2,
    "dcp_size": 2,
    "attn_cp_size": 2,
    "attn_dp_size": 2,
    "cuda_graph_config": {"decode": {"backend": "breakable"}},
    "page_size": 16,
}


def model(**traits: Any) -> SimpleNamespace:
    """Return a dense decoder-only configuration with some traits changed."""
    shape = {
        "model_type": "qwen3",
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "num_attention_heads": 4,
    }
    return SimpleNamespace(**(shape | traits))


ALL_REFUSALS = REFUSALS + CPU_REFUSALS + GPU_REFUSALS + LATER_REFUSALS


@pytest.mark.parametrize("refusal", ALL_REFUSALS, ids=lambda r: r.option)
def test_each_option_is_refused_by_name(refusal: Refusal) -> None:
    options = SimpleNamespace(**{refusal.field: BAD_VALUES.get(refusal.field, True)})
    (reason,) = reasons_against(options, on_cpu=refusal not in GPU_REFUSALS)
    assert reason.startswith(refusal.option)
    assert refusal.why in reason


def test_each_refused_option_is_documented() -> None:
    text = LIMITS_MD.read_text()
    assert not [r.option for r in ALL_REFUSALS if f"`{r.option}`" not in text]


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


@pytest.mark.parametrize(
    ("options", "on_cpu"),
    [
        ({"tp_size": 1, "pp_size": 1, "enable_mixed_chunk": False}, True),
        ({"disaggregation_mode": "null", "cuda_graph_backend_decode": None}, True),
        ({"page_size": None}, True),
        ({"page_size": 16}, False),
        *[({"kv_cache_dtype": dtype}, True) for dtype in ("auto", "bf16", "bfloat16", None)],
        *[({"kv_cache_dtype": dtype}, False) for dtype in ("fp8_e4m3", "fp8_e5m2")],
    ],
)
def test_usual_options_are_served(options: dict[str, Any], on_cpu: bool) -> None:
    assert reasons_against(SimpleNamespace(**options), on_cpu=on_cpu) == []


@pytest.mark.parametrize("dtype", ["mxfp8", "nvfp4", "fp4_mx_block16", "fp4_e2m1", "int8"])
def test_a_cache_with_scales_beside_its_keys_is_refused(dtype: str) -> None:
    (reason,) = reasons_against(SimpleNamespace(kv_cache_dtype=dtype), on_cpu=False)
    assert reason.startswith(f"--kv-cache-dtype {dtype}: ")


def test_all_reasons_come_at_once() -> None:
    options = SimpleNamespace(pp_size=2, enable_mixed_chunk=True, ep_size=4)
    assert len(reasons_against(options, on_cpu=False)) == 3


@pytest.mark.parametrize(
    ("traits", "word"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"sliding_window": 4096}, "sliding"),
        ({"sliding_window": 131071, "max_position_embeddings": 131072}, "sliding"),
        ({"sliding_window": 262144, "max_position_embeddings": 131072}, None),  # Phi-4-mini's
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "hybrid"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"attention_chunk_size": 8192}, "chunked"),
        ({"num_hidden_layers": 7}, "layer 7"),
        ({}, None),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 8}, None),
        ({"kv_lora_rank": None}, None),
    ],
)
def test_a_model_is_refused_by_its_trait(traits: dict[str, Any], word: str | None) -> None:
    reasons = reasons_against_model(model(**traits), LimConfig(select_layers=(2, 7)))
    assert len(reasons) == (word is not None)
    assert all(word in reason for reason in reasons if word)


def test_a_preset_that_cannot_serve_is_a_reason_against_the_model(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    config = LimConfig(preset=str(path))
    (reason,) = reasons_against_model(model(), config)
    assert "cannot be read (No such file or directory)" in reason
    served = model_shape(model())
    unknown = dict.fromkeys(("vocab_size", "rope_theta", "fingerprint"))
    for shape, words in (
        (replace(served, hidden_size=7), "but the model is"),
        (served, "layer 99"),
    ):
        content = {"shape": asdict(shape), "layers": [2, 99], "model": "own", **unknown}
        path.write_text(json.dumps(content))
        (reason,) = reasons_against_model(model(), config)
        assert words in reason


@pytest.mark.parametrize(
    ("settings", "reuses"),
    [
        ({}, True),
        ({"policy": "full"}, False),
        ({"policy": "streaming"}, True),
        ({"policy": "streaming", "dense_layers": tuple(range(8))}, False),
        ({"select_layers": ()}, False),
        ({"select_layers": (7,)}, False),  # of 8: nothing above it
    ],
)
def test_a_schedule_reads_sparsely_unless_all_its_layers_read_everything(
    settings: dict[str, Any], reuses: bool
) -> None:
    assert reads_sparsely(model(), LimConfig(**settings)) is reuses


def layer(index: int, **traits: Any) -> SimpleNamespace:
    """Return a plain attention layer with some traits changed."""
    plain = {"sliding_window_size": -1, "is_cross_attention": False, "logit_cap": 0.0}
    return SimpleNamespace(layer_id=index, **(plain | traits))


CAPPED = [layer(0, logit_cap=30.0), layer(1)]


@pytest.mark.parametrize(
    ("layers", "ranking", "on_cpu", "words"),
    [
        ([layer(0), layer(1)], "rank", True, None),
        ([layer(0), layer(1)], "mass", True, None),
        ([layer(0)], "rank", True, "1 attention layers, expected one in each of 2"),
        ([layer(0), layer(2)], "rank", True, "2 attention layers, expected one in each of 2"),
        ([layer(0, sliding_window_size=128), layer(1)], "rank", True, "sliding-window"),
        ([layer(0, is_cross_attention=True), layer(1)], "rank", True, "cross-attention"),
        (CAPPED, "rank", True, "SGLang ignores that on a CPU"),
        (CAPPED, "rank", False, None),
        (CAPPED, "mass", False, "--lim-ranking rank"),
    ],
)
def test_loaded_layers_are_checked_again(
    layers: list[Any], ranking: str, on_cpu: bool, words: str | None
) -> None:
    roles = (Role.SELECT, Role.REUSE)
    reasons = reasons_against_layers(layers, roles, LimConfig(ranking=ranking), on_cpu=on_cpu)
    assert len(reasons) == (words is not None)
    assert all(words in reason for reason in reasons if words)


@pytest.mark.parametrize(
    ("both", "decode", "ours"),
    [("lim", None, True), ("fa3", "lim", True), ("lim", "fa3", False), (None, None, False)],
)
def test_the_decode_backend_decides(both: str | None, decode: str | None, ours: bool) -> None:
    options = SimpleNamespace(attention_backend=both, decode_attention_backend=decode)
    assert decodes_with_lim(options) is ours


H100 = Gpu("H100", (9, 0), compiles=True, shared_bytes=232_448)
A100 = Gpu("A100", (8, 0), compiles=True, shared_bytes=166_912)
A10 = Gpu("A10", (8, 6), compiles=True, shared_bytes=101_376)
CONTEXT = 131_072
MODEL = SimpleNamespace(hidden_size=4096, num_attention_heads=32)


def test_every_reason_is_named_at_once() -> None:
    old = Gpu("T4", (7, 5), compiles=False, shared_bytes=65_536)
    odd = SimpleNamespace(hidden_size=2560, num_attention_heads=32)
    environment = {"LIM_TRACE": "/somewhere", "TRITON_INTERPRET": "1"}
    reasons = reasons_against_gpu(old, odd, environment)
    expected = ["T4 has compute capability 7.5", "no nvcc", "heads of 80 dimensions", "LIM_AUDIT"]
    expected.append("TRITON_INTERPRET is set")
    assert len(reasons) == len(expected)
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason


@pytest.mark.parametrize(("value", "refused"), [("true", True), ("1", True), ("false", False)])
def test_a_graph_around_the_beginning_of_a_step_is_refused(value: str, refused: bool) -> None:
    reasons = reasons_against_gpu(H100, MODEL, {"SGLANG_ENABLE_METADATA_GLUE_GRAPH": value})
    assert [each.split()[0] for each in reasons] == ["SGLANG_ENABLE_METADATA_GLUE_GRAPH"] * refused


@pytest.mark.parametrize(("value", "refused"), [("TRUE", True), ("on", True), ("0", False)])
def test_interpreting_is_refused_as_triton_reads_it(value: str, refused: bool) -> None:
    for config in (MODEL, None):
        reasons = reasons_against_gpu(H100, config, {"TRITON_INTERPRET": value})
        assert len(reasons) == refused


@pytest.mark.parametrize(
    ("gpu", "budget", "limit"),
    [
        (H100, 21_845, None),  # 16,384 selected
        (H100, 21_847, 21_845),
        (A100, 30_000, 21_845),
        (A10, 10_922, None),  # 8,192 selected
        (A10, 10_924, 10_922),
        (A10, CONTEXT - 1, 10_922),
        (A10, CONTEXT, None),  # all layers are dense
    ],
)
def test_a_budget_is_refused_that_no_program_could_sort(
    gpu: Gpu, budget: int, limit: int | None
) -> None:
    reasons = reasons_against_selection(gpu, LimConfig(budget=budget), CONTEXT, "auto", None)
    assert len(reasons) == (limit is not None)
    for reason in reasons:
        assert f"a budget of {budget} selects {int(budget * 0.75)} tokens" in reason
        assert f"--lim-budget {limit} or less" in reason
        assert gpu.name in reason


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.9, 0.999])
def test_the_budget_that_is_proposed_is_served(ratio: float) -> None:
    refused = LimConfig(budget=2**30, recent_ratio=ratio)
    (reason,) = reasons_against_selection(A10, refused, 2**31, "auto", None)
    proposed = int(reason.split("--lim-budget ")[1].split()[0])
    for served in (replace(refused, budget=proposed), replace(refused, recent_ratio=1)):
        assert reasons_against_selection(A10, served, 2**31, "auto", None) == []


@pytest.mark.parametrize(
    ("gpu", "budget", "dtype", "refused"),
    [
        (A100, 2048, "fp8_e4m3", True),
        (A100, 2048, "fp8_e5m2", False),
        (A100, CONTEXT, "fp8_e4m3", False),  # all layers are dense
        (H100, 2048, "fp8_e4m3", False),
    ],
)
def test_an_option_for_a_cache_that_cannot_be_read_is_refused(
    gpu: Gpu, budget: int, dtype: str, refused: bool
) -> None:
    reasons = reasons_against_selection(gpu, LimConfig(budget=budget), CONTEXT, dtype, None)
    assert len(reasons) == refused


@pytest.mark.parametrize(
    ("dtype", "capability", "words"),
    [
        (torch.bfloat16, (8, 0), None),
        (torch.float16, (8, 0), "a KV cache of float16 cannot be scored with queries of bfloat16"),
        (torch.float8_e5m2, (8, 0), None),
        (torch.float8_e4m3fn, (8, 6), "8.9 (Ada) or newer, not 8.6: use --kv-cache-dtype fp8_e5m2"),
        (torch.float8_e4m3fn, (8, 9), None),
        (torch.float4_e2m1fn_x2, (10, 0), "a KV cache of float4_e2m1fn_x2 cannot be scored"),
    ],
)
def test_a_cache_is_served_whose_keys_can_be_scored(
    dtype: torch.dtype, capability: tuple[int, int], words: str | None
) -> None:
    reasons = reasons_against_kv_cache(dtype, torch.bfloat16, capability)
    assert len(reasons) == (words is not None)
    assert all(words in reason for reason in reasons if words)


def test_drafts_are_not_verified_over_a_cache_of_fp8_that_a_checkpoint_asks_for() -> None:
    """`--kv-cache-dtype auto` leaves the choice to the checkpoint, after options were checked."""
    of = partial(reasons_against_kv_cache, queries=torch.bfloat16, capability=(9, 0))
    (reason,) = of(torch.float8_e4m3fn, policy=Lossless())
    assert "policy lossless with a KV cache of float8_e4m3fn, which the checkpoint asks" in reason
    assert of(torch.bfloat16, policy=Lossless()) == []
    assert of(torch.float8_e4m3fn, policy=LessIsMore(budget=64)) == []


@pytest.mark.parametrize(
    ("config", "dimensions"),
    [
        ({"hidden_size": 576, "num_attention_heads": 9}, 64),
        ({"hidden_size": 2560, "num_attention_heads": 32, "head_dim": 128}, 128),
        ({"hidden_size": 2560, "num_attention_heads": 32, "head_dim": None}, 80),
    ],
)
def test_the_stated_head_dimension_wins(config: dict, dimensions: int) -> None:
    assert head_dim_of(SimpleNamespace(**config)) == dimensions


def test_nvcc_is_looked_for_where_cuda_home_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not has_nvcc()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert has_nvcc()


@pytest.mark.parametrize(
    ("policy", "rows", "words"),
    [
        ("tidal", None, "--max-running-requests"),
        ("tidal", 8, None),
        ("quest", None, "--max-running-requests"),
        ("quest", 8, None),
        ("streaming", None, None),
    ],
)
def test_lists_of_single_heads_need_a_limit_of_rows(
    policy: str, rows: int | None, words: str | None
) -> None:
    reasons = reasons_against_selection(H100, LimConfig(policy=policy), CONTEXT, "auto", rows)
    assert len(reasons) == (words is not None)
    assert all(str(words) in reason for reason in reasons)


def test_a_gate_is_refused_on_a_cache_of_fp8() -> None:
    seer = LimConfig(policy="seer", gate="g")
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        (reason,) = reasons_against_selection(H100, seer, CONTEXT, dtype, 8)
        assert "keys before RoPE" in reason
        assert not reasons_against_selection(H100, LimConfig(policy="quest"), CONTEXT, dtype, 8)
    assert not reasons_against_selection(H100, seer, CONTEXT, "auto", 8)


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 10000}, 10000),
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
        ({}, None),
    ],
)
def test_the_base_of_rope_is_read_where_transformers_and_older_files_have_it(
    config: dict, theta: float | None
) -> None:
    assert model_traits(SimpleNamespace(**config)) == {"vocab_size": None, "rope_theta": theta}


@pytest.mark.parametrize(
    ("num_ranks", "heads", "kv_heads", "on_cpu", "words"),
    [
        (1, 9, 3, True, None),
        (3, 9, 3, True, None),
        (4, 8, 2, False, None),  # two ranks have a copy of each KV head
        (4, 8, 2, True, "8 query heads and 2 KV heads equally: use 1, 2"),
        (3, 9, None, True, None),
        (2, 9, 3, True, "9 query heads and 3 KV heads equally: use 1, 3"),
        (2, 9, 3, False, "9 query heads and 3 KV heads equally: use 1, 3, 9"),
        (6, 24, 4, False, "use 1, 2, 4, 8, 12, 24"),
        (16, 8, 2, False, "use 1, 2, 4, 8"),
    ],
)
def test_ranks_need_equal_shares_of_heads(
    num_ranks: int, heads: int, kv_heads: int | None, on_cpu: bool, words: str | None
) -> None:
    config = model(num_attention_heads=heads, num_key_value_heads=kv_heads)
    reasons = reasons_against_ranks(num_ranks, config, LimConfig(), on_cpu=on_cpu)
    assert len(reasons) == (words is not None)
    assert all(str(words) in each and f"--tp-size {num_ranks}:" in each for each in reasons)


def test_heads_that_sglang_adds_on_a_cpu_are_no_heads_of_the_model() -> None:
    config = model(
        num_attention_heads=8,
        num_key_value_heads=4,
        original_num_attention_heads=4,
        original_total_num_kv_heads=2,
    )
    (reason,) = reasons_against_ranks(4, config, LimConfig(), on_cpu=True)
    assert "4 query heads and 2 KV heads equally: use 1, 2" in reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "quest", "shared_by": "kv_head"}, "4 ranks have 2 KV heads"),
        ({"policy": "delta"}, "policy delta selects on a CPU only so far"),
        ({"policy": "quest"}, None),
        ({"policy": "tidal"}, None),
        ({"policy": "streaming"}, None),
        ({"policy": "full"}, None),
    ],
)
def test_some_policies_are_refused_on_several_ranks(
    settings: dict[str, Any], words: str | None
) -> None:
    config = model(num_attention_heads=8, num_key_value_heads=2)
    reasons = reasons_against_ranks(4, config, LimConfig.from_mapping(settings), on_cpu=False)
    assert len(reasons) == (words is not None)
    assert all(str(words) in reason for reason in reasons)
