"""What `LimModelRunner` decides around a step: memory for selection, and when a graph is left."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from lim_sglang import compat
from lim_sglang.config import CHECKED_MARK, LimConfig, ModelShape, Preset, find_preset
from lim_sglang.counters import Stats
from lim_sglang.errors import RefusedError, ServerError
from lim_sglang.kernels.reference import split_budget
from lim_sglang.kernels.selector import RankSelector, Room
from lim_sglang.layers.attention import AttentionLayers
from lim_sglang.layers.linear import SkinnyLinears
from lim_sglang.lossless.sampler import seed_of
from lim_sglang.model_runner import LimModelRunner, live_state, model_rope
from lim_sglang.models import weights_fingerprint
from lim_sglang.policies.policy import Role

GIB = 2**30
CACHE_BYTES = 2 * 4 * (64 + 64) * 2
"""Bytes of a token: two layers, four KV heads, 16 bits."""


def runner(**attributes: Any) -> LimModelRunner:
    """Return a runner that has loaded no model."""
    made = object.__new__(LimModelRunner)
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize(
    ("before_model", "free", "limit", "tokens"),
    [
        (80, 60, None, (60 - 16) * GIB // CACHE_BYTES),  # SGLang leaves a fifth of 80 GiB free
        (80, 60, 1000, 1000),
        (80, 10, None, 0),
    ],
)
def test_the_caches_tokens_are_estimated_by_what_was_free_before_the_model(
    before_model: int, free: int, limit: int | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may hold memory of the GPU, so its size says nothing."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 141 * GIB))
    made = sizing_runner(before_model, limit, num_ranks=1)
    assert made._estimate_tokens() == pytest.approx(tokens, abs=1)


def sizing_runner(before_model: int, limit: int | None, num_ranks: int) -> LimModelRunner:
    """Return a runner of a model with 4 KV heads that is about to size its KV cache."""
    config = SimpleNamespace(
        get_num_attention_heads=lambda ranks: 8 // ranks,
        get_num_kv_heads=lambda ranks: 4 // ranks,
        head_dim=64,
        v_head_dim=64,
    )
    return runner(
        model_config=config,
        ps=SimpleNamespace(attn_tp_rank=0, attn_tp_size=num_ranks),
        lim_roles=(Role.FULL, Role.REUSE),
        kv_cache_dtype=torch.bfloat16,
        pre_model_load_memory=float(before_model),
        mem_fraction_static=0.8,
        server_args=SimpleNamespace(max_total_tokens=limit),
    )


def test_ranks_agree_on_the_caches_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has half of the KV heads, and the other one has less memory free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GIB, 141 * GIB))
    others = SimpleNamespace(all_gather_object=lambda tokens: [tokens, tokens - 7])
    monkeypatch.setattr(compat.Ranks, "_group", others)
    tokens = sizing_runner(80, None, num_ranks=2)._estimate_tokens()
    assert tokens == pytest.approx((60 - 16) * GIB // (CACHE_BYTES // 2) - 7, abs=1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_with_more_tokens_than_fit_leaves_the_graph_for_once(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def forward(self: Any, _batch: Any) -> None:
        used.append(self.decode_cuda_graph_runner)
        if fails:
            raise KeyError

    monkeypatch.setattr(compat.ModelRunner, "_forward_raw", forward)
    split = split_budget(64, 0.25, sinks=4)
    made = runner(
        lim_selector=RankSelector.allocate(split, Room(8, 4, 2, 400, 1000, "cpu")),
        lim_stats=Stats(),
        decode_cuda_graph_runner="graphs",
    )
    for lengths in ([400, 400, 200], [400, 400, 201], [1]):
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: True),
            seq_lens_cpu=torch.tensor(lengths),
        )
        try:
            made._forward_raw(batch)
        except KeyError:
            assert fails
        assert made.decode_cuda_graph_runner == "graphs"
    assert used == ["graphs", None, "graphs"]
    assert made.lim_stats.oversized_steps == 1


def test_a_step_before_the_graphs_are_made_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.ModelRunner, "_forward_raw", lambda *_: "ran")
    made = runner(lim_selector=None)
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True))
    assert made._forward_raw(batch) == "ran"


def test_a_runner_whose_options_were_not_checked_is_refused_in_words() -> None:
    """SGLang did not call our hook, as from 0.5.20 on it would not, without a word."""
    unchecked = object.__new__(compat.ServerArgs)
    with pytest.raises(ServerError, match=r"checks of options, .* were skipped: .*__post_init__"):
        LimModelRunner(model_config=None, server_args=unchecked)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_checked_options_are_marked_in_copies_and_child_processes(
    copied: Callable[[Any], Any],
) -> None:
    checked = object.__new__(compat.ServerArgs)
    setattr(checked, CHECKED_MARK, True)
    with pytest.raises(AttributeError, match="hf_text_config"):  # which comes after the mark
        LimModelRunner(model_config=None, server_args=copied(checked))


@pytest.mark.parametrize("tried", [None, "0.5.23"])
def test_an_sglang_that_is_tried_is_shown(
    monkeypatch: pytest.MonkeyPatch, tried: str | None
) -> None:
    monkeypatch.setattr(compat, "tried_version", lambda: tried)
    monkeypatch.setattr(compat, "serves_on_cpu", lambda: True)
    made = runner(
        lim_config=LimConfig(policy="full"),
        lim_roles=(),
        lim_stats=Stats(),
        lim_drafting=None,
        lim_preset=None,
        lim_selector=None,
        lim_linears=SkinnyLinears(()),
        lim_attentions=AttentionLayers((), None, torch.bfloat16),
        sampler=None,
        model_config=SimpleNamespace(get_default_sampling_params=dict),
    )
    state = live_state(made)
    assert state.get("tried_sglang") == tried
    assert "layer_kernels" not in state
    made.lim_linears.layers = [None] * 5
    kernels = {"skinny_gemm": 5, "norm_rope_store": 0}
    assert live_state(made)["layer_kernels"] == kernels


def test_seeds_are_numbers_of_64_bits_whatever_a_sample_adds() -> None:
    def request(seed: int | None, rid: str = "a") -> Any:
        return SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed), rid=rid)

    seeds = [0, -5, 2**63 - 1, 2**63, 2**63 + 7, -(2**63)]
    found = torch.tensor([seed_of(request(seed)) for seed in seeds])
    assert found.tolist() == [0, -5, 2**63 - 1, -(2**63), -(2**63) + 7, -(2**63)]
    assert seed_of(request(None)) == seed_of(request(None)) != seed_of(request(None, "b"))


def test_a_preset_of_other_weights_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    safetensors.torch.save_file({"a": torch.ones(8)}, tmp_path / "model.safetensors")
    own = weights_fingerprint(str(tmp_path))
    shape = ModelShape("llama", 30, 576, 9)
    text_config = SimpleNamespace(vocab_size=49152, rope_theta=1e5)
    made = runner(
        lim_config=LimConfig(select_layers=(2, 15)),
        model_config=SimpleNamespace(
            hf_text_config=text_config, model_path=str(tmp_path), revision=None
        ),
    )
    for fingerprint, differences in ((own, []), ("another", ["other weights"])):
        preset = Preset((2, 15), "SmolLM2-own", 49152, 1e5, fingerprint)
        content = {"shape": asdict(shape), **asdict(preset)}
        (tmp_path / "preset.json").write_text(json.dumps(content))
        config = LimConfig(preset=str(tmp_path / "preset.json"))
        found = made._compare_with_measured(find_preset(config, shape))
        assert found == {"measured_on": "SmolLM2-own", "differences": differences}
        assert ("SmolLM2-own was, and this model has other weights" in caplog.text) == bool(
            differences
        )


def rope(positions: int, *, neox: bool = True, rotary: int = 8) -> torch.nn.Module:
    """Return a stand-in for SGLang's rotary embedding of heads of 8 dimensions."""
    module = torch.nn.Module()
    module.register_buffer("cos_sin_cache", torch.rand(positions, 8))
    module.is_neox_style, module.rotary_dim, module.head_size = neox, rotary, 8
    return module


def test_a_rope_table_has_rows_for_the_surplus_step() -> None:
    """Two layers share one RoPE, as SGLang's do; the table is a copy."""
    shared = rope(10)
    model = torch.nn.ModuleList([torch.nn.ModuleList([shared]), torch.nn.ModuleList([shared])])
    table = model_rope(model, 10, 3)
    assert torch.equal(table[:10], shared.cos_sin_cache)
    assert torch.equal(table[10:], shared.cos_sin_cache[-1:].expand(3, -1))
    assert torch.equal(model_rope(model, 6, 1), shared.cos_sin_cache[:7])
    shared.cos_sin_cache.zero_()
    assert table.all()


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([rope(10), rope(10)], "2 kinds of RoPE, a gate is made for one: serve another policy"),
        ([], "0 kinds of RoPE"),
        ([rope(10, neox=False)], "not half-split .*: serve another policy"),
        ([rope(10, rotary=4)], "not half-split"),
        ([rope(9)], "has 9 positions.*: use --context-length 9 or less"),
    ],
)
def test_a_rope_that_no_gate_was_trained_for_is_refused(
    layers: list[torch.nn.Module], words: str
) -> None:
    with pytest.raises(RefusedError, match=words):
        model_rope(torch.nn.ModuleList(layers), 10, 3)
