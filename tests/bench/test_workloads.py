"""Points, backends and models as the command line names them."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from lim_sglang.bench import workloads
from lim_sglang.bench.workloads import SHAPES, CacheDtype, ModelChoice, Point, SparseReads
from lim_sglang.config import PRESETS, LimConfig, ModelShape
from lim_sglang.errors import ConfigError, ModelError
from lim_sglang.policies.policy import Role
from lim_sglang.validation import KV_CACHE_DTYPES

PARAMETERS = {
    "qwen3-8b": 8.19e9,
    "qwen3-4b": 4.02e9,
    "qwen3-4b-2507": 4.02e9,
    "qwen3-1.7b": 1.72e9,
    "qwen3-32b": 32.76e9,
    "qwen3-30b-a3b": 30.53e9,
    "llama-8b": 8.03e9,
    "coder-1.5b": 1.54e9,
}
"""Published numbers of parameters, a tied embedding counted once."""


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("2x32768", (32768,) * 2),
        ("2x32k", (32768,) * 2),
        ("1X1K", (1024,)),
        (" 3x16k ", (16384,) * 3),
        ("2x1k + 3x5", (1024, 1024, 5, 5, 5)),
        ("2x5+1x5", (5, 5, 5)),
    ],
)
def test_a_point_is_read_in_tokens_or_in_units_of_1024(text: str, lengths: tuple[int, ...]) -> None:
    point = Point.parse(text)
    assert (point.lengths, point.is_mixed) == (lengths, len(set(lengths)) > 1)
    assert Point.parse(str(point)) == point


MALFORMED = ("8", "x32768", "8x", "8*32k", "8x32m", "-1x5", "8x3.5k", "0x5", "5x0", "4x1k+")


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_point_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a point is such as 8x32768"):
        Point.parse(text)


def test_only_rows_over_the_budget_are_sparse() -> None:
    assert Point((9, 8, 7, 9)).rows_over(8) == (0, 3)
    assert Point((8, 8)).rows_over(8) == ()


def test_points_keep_their_order_and_repeats_are_dropped() -> None:
    points = workloads.choose_points(["8x32k", "1x32k", "8x32768"], 16, 512)
    assert [str(point) for point in points] == ["8x32768", "1x32768", "16x512"]


@pytest.mark.parametrize(
    ("texts", "batch", "context", "words"),
    [
        (["1x5"], 8, None, "both or neither"),
        (["1x5"], None, 5, "both or neither"),
        ([], None, None, "at least one point"),
        ([], 0, 5, "a point is such as"),
    ],
)
def test_incomplete_points_are_refused(
    texts: list[str], batch: int | None, context: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        workloads.choose_points(texts, batch, context)


def test_our_backend_comes_first_because_the_runner_is_built_with_it() -> None:
    found = workloads.read_backends("flashinfer, lim,fa3,flashinfer", ModelChoice("qwen3-8b"))
    assert found == ("lim", "flashinfer", "fa3")
    assert workloads.read_backends("triton") == ("triton",)
    layers = workloads.read_backends("lim,flashinfer+layers", ModelChoice("qwen3-8b"), by_step=True)
    assert layers == ("lim", "flashinfer+layers")


@pytest.mark.parametrize(
    ("text", "kv_cache_dtype", "words"),
    [
        ("flashinfer", "auto", "must name lim"),
        ("lim,fa4,x", "auto", "unknown backend fa4, x; known: lim, flashinfer"),
        ("lim,flashinfer+layers", "auto", r"unknown backend flashinfer\+layers"),
        ("lim,fa3", "fp8_e5m2", "fa3 reads no KV cache of fp8_e5m2"),
    ],
)
def test_backends_that_cannot_be_compared_are_refused(
    text: str, kv_cache_dtype: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        workloads.read_backends(text, ModelChoice("qwen3-8b", None, kv_cache_dtype))


@pytest.mark.parametrize(
    ("shape", "folder", "words"),
    [
        (None, None, "either --shape"),
        ("qwen3-8b", "/models/x", "either --shape"),
        ("qwen4", None, "'qwen4'; known shapes: qwen3-8b, .*llama-8b"),
    ],
)
def test_one_known_model_has_to_be_named(shape: str | None, folder: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelChoice(shape, folder)


def test_every_kv_cache_that_is_measured_is_served() -> None:
    assert set(get_args(CacheDtype)) <= set(KV_CACHE_DTYPES)


def count_parameters(config: Any) -> int:
    """Count the parameters in matrices of a decoder; norms are left out."""
    hidden, heads, kv_heads = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim = config.get("head_dim", hidden // heads)
    attention = head_dim * hidden * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * config["intermediate_size"]
    if experts := config.get("num_experts"):
        mlp = experts * hidden * (3 * config["moe_intermediate_size"] + 1)  # 1: the router
    layer = attention + mlp
    tables = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(SHAPES[name]) == pytest.approx(PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-4b", "llama-8b"])
def test_the_papers_layers_apply_to_the_shape(name: str) -> None:
    fields = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")
    assert ModelShape(*(SHAPES[name][field] for field in fields)) in PRESETS


@pytest.mark.parametrize(("longest", "context"), [(1024, 40960), (65536, 65536)])
def test_a_shapes_context_is_stretched_where_needed(
    tmp_path: Path, longest: int, context: int
) -> None:
    workloads.write_shape("qwen3-8b", tmp_path, longest)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {**SHAPES["qwen3-8b"], "max_position_embeddings": context}


def test_a_shapes_tokenizer_has_a_word_for_each_token(tmp_path: Path) -> None:
    # SGLang's benchmark client counts only tokens that have text.
    from transformers import AutoConfig, AutoTokenizer

    workloads.write_shape("qwen3-1.7b", tmp_path, 1024)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = [0, 7, AutoConfig.from_pretrained(tmp_path).eos_token_id, 151935]
    assert [tokenizer.decode([token]) for token in tokens] == [str(token) for token in tokens]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    folder = ModelChoice(None, str(tmp_path)).as_folder(1)
    with pytest.raises(ModelError, match="holds no config"), folder:
        pass


def facts(weight_bytes: float, token_bytes: int, roles: tuple[Role, ...]) -> dict[str, Any]:
    """Return the facts that the byte limit is made from."""
    return {
        "weight_bytes_read": int(weight_bytes),
        "kv_bytes_per_token_and_layer": token_bytes,
        "roles": [role.value for role in roles],
    }


ROLES = LimConfig(select_layers=(2, 12)).make_policy().roles(36)


@pytest.mark.parametrize(
    ("weight_bytes", "point", "expected"),
    [
        (16.4e9, "1x32k", 1.23),
        (16.4e9, "16x32k", 3.20),
        (16.4e9, "8x1k", 1.0),  # within the budget both read the same
        # Attention alone.
        (0, "1x8k", 3.0),
        (0, "64x16k", 4.5),
        (0, "64x64k", 7.2),
    ],
)
def test_qwen3_8b_has_the_known_ceilings(weight_bytes: float, point: str, expected: float) -> None:
    found, where = facts(weight_bytes, 2 * 8 * 128 * 2, ROLES), Point.parse(point)
    reads = SparseReads.shared(where, found, 2048)
    speedup = workloads.step_bytes(where, found, None) / workloads.step_bytes(where, found, reads)
    assert speedup == pytest.approx(expected, abs=0.005 if weight_bytes else 0.05)


def test_bytes_of_one_step_by_hand() -> None:
    roles = (Role.FULL, Role.SELECT, Role.REUSE, Role.REUSE)
    found, point = facts(1000, 10, roles), Point((50, 50, 7))
    assert workloads.step_bytes(point, found, None) == 1000 + 10 * 4 * (50 + 50 + 7)
    # The row within the budget is read whole.
    kept = 2 * (50 + 50 + 7) + 2 * (20 + 20 + 7)
    reads = SparseReads.shared(point, found, 20)
    assert workloads.step_bytes(point, found, reads) == 1000 + 10 * kept
    unions = SparseReads(num_layers=3, tokens=70.5, summary_bytes=99)
    assert workloads.step_bytes(point, found, unions) == 1000 + 10 * (107 + 3 * 70.5) + 99


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ([], []),
        (["quest, streaming", "tidal"], ["quest", "streaming", "tidal"]),
        (
            ["quest", '{"policy": "quest", "shared_by": "all"}', '{"dense_layers": [0]}'],
            ["quest", "quest shared_by=all", "lessismore dense_layers=[0]"],
        ),
    ],
)
def test_policies_are_named_by_their_settings(texts: list[str], names: list[str]) -> None:
    found = workloads.read_policies(texts, 512)
    assert list(found) == names
    assert {config.budget for config in found.values()} <= {512}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["quest,quest"], "names quest twice"),
        (["quest", '{"policy": "quest", "shared_by": "query_head"}'], "shared_by=query_head twice"),
        (['{"policy": "quest", "budget": 64}'], "that of --budget"),
        (['{"policy": ["quest"]}'], "policy must be"),
        (['{"policy": null}'], "policy"),
        (["full"], "--policy full reads everything, as what policies"),
        (["nothing"], "policy must be"),
        (['{"policy"}'], "is not JSON"),
        (['{"policy": "quest", "sinks": 3}'], "sinks"),
    ],
)
def test_policies_that_cannot_be_compared_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        workloads.read_policies(texts, 512)


def test_contenders_share_the_page_size_that_any_policy_needs() -> None:
    policies = workloads.read_policies(["streaming"], 512)
    assert workloads.options_of_policies({}, 8) == {}
    assert workloads.options_of_policies(policies, 8)["page_size"] == 1
    policies |= workloads.read_policies(["quest"], 512)
    found = workloads.options_of_policies(policies, 8)
    assert found == {"page_size": 64, "max_running_requests": 8}
