"""The plugin: its refusals before SGLang starts, and its work inside real SGLang processes."""

import argparse
import ast
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang import compat, model_runner, plugin
from lim_sglang.config import CHECKED_MARK, LimConfig
from lim_sglang.errors import RefusedError, ServerError
from lim_sglang.flags import add_flags, option_names
from lim_sglang.launch.server import RESERVED_OPTIONS
from lim_sglang.validation import CPU_REFUSALS, REFUSALS, Gpu, Refusal
from tests.processes import (
    Answer,
    clean_environment,
    kept_sets,
    set_differences,
    token_differences,
)
from tests.server.in_process import run_in_process
from tests.server.oracle import Oracle, OracleRun
from tests.server.test_validation import BAD_VALUES
from tests.server.tiny_model import BUDGET, NUM_NEW, SELECT_LAYERS, Prompt, long_prompts

A10 = Gpu("A10", (8, 6), compiles=True, shared_bytes=101_376)
MODEL = SimpleNamespace(
    model_type="qwen3", num_hidden_layers=36, hidden_size=4096, num_attention_heads=32
)
CONTEXT = 40_960


@pytest.fixture
def asked_options() -> list[SimpleNamespace]:
    """Options of the starts of a test, as they are after the checks."""
    return []


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, asked_options: list[SimpleNamespace]
) -> Callable[..., list[str]]:
    """Return a function that lists the reasons against a start with these options and settings."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("LIM_TRACE", raising=False)
    monkeypatch.setattr(compat, "load_model_config", lambda _options: MODEL)
    monkeypatch.setattr(compat, "context_length", lambda _options, _model: CONTEXT)
    monkeypatch.setattr(compat, "reasons_against_decode_stack", lambda: ["another flashinfer"])

    def ask(settings: str = "{}", gpu: Gpu | None = A10, **options: Any) -> list[str]:
        monkeypatch.setattr(compat, "serves_on_cpu", lambda: gpu is None)
        monkeypatch.setattr(plugin, "find_gpu", lambda: gpu)
        monkeypatch.setenv("LIM_CONFIG", settings)
        given = {
            "attention_backend": "lim",
            "decode_attention_backend": None,
            "prefill_attention_backend": None,
            "kv_cache_dtype": "auto",
            "max_running_requests": None,
            "page_size": None,
            "tp_size": 1,
        }
        asked_options.append(SimpleNamespace(**(given | options)))
        try:
            plugin._refuse(asked_options[-1])
        except RefusedError as error:
            return list(error.reasons)
        return []

    return ask


@pytest.mark.parametrize("given", [None, '{"budget": 300}'])
def test_a_start_in_the_same_process_does_not_inherit_the_flags_of_the_last(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setattr(plugin, "_FOUND", {})
    monkeypatch.setenv("LIM_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("LIM_CONFIG")
    parser = argparse.ArgumentParser()
    add_flags(parser)
    found = []
    for line in ("--lim-sinks 2", "--lim-recent-ratio 0.5", "", "--lim-budget 512"):
        plugin._keep_settings(parser.parse_args(line.split()))
        config = LimConfig.from_json(os.environ["LIM_CONFIG"])
        found.append((config.budget, config.sinks, config.recent_ratio))
    budget = 300 if given else 2048
    assert found == [(budget, 2, 0.25), (budget, 4, 0.5), (budget, 4, 0.25), (512, 4, 0.25)]


def test_the_decode_stack_is_checked_on_a_gpu_only(start: Callable[..., list[str]]) -> None:
    assert start() == ["another flashinfer"]
    assert start(gpu=None) == []
    assert start(attention_backend="flashinfer") == []


def test_options_are_marked_once_they_have_passed(
    start: Callable[..., list[str]],
    asked_options: list[SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "reasons_against_decode_stack", list)
    assert start("{}") == start("{}", gpu=None) == start(attention_backend="flashinfer") == []
    assert start(pp_size=2)
    marks = [getattr(options, CHECKED_MARK, False) for options in asked_options]
    assert marks == [True, True, False, False]


READERS = ("validation", "plugin", "compat", "mends", "model_runner", "request_door", "lossless")
"""Modules of lim_sglang/, and the folder, that read SGLang's options."""


def test_each_option_that_is_read_or_set_is_checked_to_exist() -> None:
    folder = Path(plugin.__file__).parent
    files = [each for name in READERS for each in folder.glob(f"{name}.py")]
    nodes = [
        node
        for file in (*files, *(folder / "lossless").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).split(".")[-1] in ("server_args", "options")
    ]
    read = {node.attr for node in nodes}
    assert {"tp_size", "page_size", "speculative_num_steps", "cuda_graph_config"} <= read
    assert read - {"get"} <= plugin.FIELDS  # of a dictionary


@pytest.mark.parametrize("tried", [None, "9.9"])
def test_a_renamed_option_or_a_release_that_is_tried_is_told_before_anything_is_hooked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tried: str | None
) -> None:
    for name in ("check_version", "check_signatures"):
        monkeypatch.setattr(compat, name, lambda: None)
    monkeypatch.setattr(compat, "tried_version", lambda: tried)
    monkeypatch.setattr(compat, "register_backend", lambda *_: pytest.fail("hooked"))
    monkeypatch.setattr(plugin, "FIELDS", {"tp_size", "renamed"})
    with pytest.raises(ServerError, match="ServerArgs has no renamed, which lim-sglang checks"):
        plugin.register()
    monkeypatch.setattr(plugin, "FIELDS", {"tp_size"})
    monkeypatch.setattr(compat, "register_backend", lambda *_: json.loads(""))
    with pytest.raises(json.JSONDecodeError):
        plugin.register()
    assert ("LIM_ALLOW_SGLANG lets SGLang 9.9 serve" in caplog.text) == bool(tried)


def test_selection_is_checked_with_everything_else(start: Callable[..., list[str]]) -> None:
    reasons = start('{"budget": 20000}', kv_cache_dtype="fp8_e4m3", pp_size=2)
    expected = ["--pp-size 2", "another flashinfer", "a budget of 20000", "fp8_e4m3 needs"]
    assert len(reasons) == len(expected)
    for words, reason in zip(expected, reasons, strict=True):
        assert words in reason


@pytest.mark.parametrize(
    "settings",
    [
        '{"policy": "full"}',
        '{"budget": 20000, "select_layers": []}',
        f'{{"budget": {CONTEXT}}}',
    ],
)
def test_a_selection_that_never_runs_is_not_checked(
    start: Callable[..., list[str]], settings: str
) -> None:
    assert start(settings, kv_cache_dtype="fp8_e4m3") == ["another flashinfer"]


def test_blocks_of_keys_that_would_not_stay_with_their_summaries_are_refused(
    start: Callable[..., list[str]],
) -> None:
    quest = '{"policy": "quest", "shared_by": "all"}'
    given = {"page_size": 24, "enable_lmcache": True}
    _, lmcache, page = start(quest, **given)
    assert lmcache == "--enable-lmcache: keys could come back without their summaries"
    assert page.startswith("--page-size 24: policy quest keeps blocks of 16 tokens in consecutive")
    assert start(quest, page_size=48) == start("{}", **given) == ["another flashinfer"]


@pytest.mark.parametrize(
    ("settings", "given", "page_size"),
    [('{"policy": "quest"}', None, 64), ('{"policy": "quest"}', 32, 32), ("{}", None, None)],
)
def test_a_policy_with_summaries_has_a_page_size_by_default(
    start: Callable[..., list[str]],
    asked_options: list[SimpleNamespace],
    settings: str,
    given: int | None,
    page_size: int | None,
) -> None:
    start(settings, page_size=given)
    assert asked_options[-1].page_size == page_size


@pytest.mark.parametrize(
    ("others", "live"), [([{"steps": 3}], 2), ([{"steps": 2}], 1), ([None, {"steps": 3}], 2)]
)
def test_each_rank_that_decodes_alike_is_counted_and_what_ranks_count_is_added_up(
    monkeypatch: pytest.MonkeyPatch, others: list[dict[str, int] | None], live: int
) -> None:
    own, counts = {"steps": 3}, {"checked_sets": 5, "wrong_sets": 0}
    monkeypatch.setattr(model_runner, "live_state", lambda _runner: dict(own))
    monkeypatch.setattr(model_runner, "device_counts", lambda _runner: counts)
    of_others = [counts | {"wrong_sets": 1} for _ in others]
    gathered = iter([[own, *others], [counts, *of_others]])
    monkeypatch.setattr(compat, "gather_states", lambda _scheduler, _state: next(gathered))
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(decode_attention_backend=None, attention_backend="lim"),
        ps=SimpleNamespace(attn_tp_size=1 + len(others)),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lim_stats=None)),
    )
    result = SimpleNamespace(internal_state={})
    plugin._show_state(result, scheduler, None)
    assert result.internal_state["lim"] == {
        "steps": 3,
        "ranks": 1 + len(others),
        "live_ranks": live,
        # Ranks count together: a rank without our runner would let the others wait.
        **({} if None in others else {"checked_sets": 10, "wrong_sets": 1}),
    }


def test_settings_that_are_wrong_are_named_once(start: Callable[..., list[str]]) -> None:
    assert len(start('{"budget": 0}', gpu=None)) == 1
    assert len(start('{"select_layers": [99]}', gpu=None)) == 1


PLAIN_MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}
SLIDING_MODEL = PLAIN_MODEL | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 1024,
}
MLA_MODEL = PLAIN_MODEL | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 16,
}
HYBRID_MODEL = PLAIN_MODEL | {"layer_types": ["full_attention", "sliding_attention"] * 4}
MODELS = {"plain": PLAIN_MODEL, "sliding": SLIDING_MODEL, "mla": MLA_MODEL, "hybrid": HYBRID_MODEL}


@dataclass(frozen=True)
class Start:
    """A command line, and the words of its refusal; no words if it is served."""

    options: tuple[str, ...]
    words: tuple[str, ...] = ()
    model: str = "plain"
    backend: tuple[str, ...] = ("--attention-backend", "lim")


def as_typed(refusal: Refusal) -> tuple[str, ...]:
    """Return an option with a value that is refused."""
    value = BAD_VALUES.get(refusal.field, True)
    if value is True:
        return (refusal.option,)
    return (refusal.option, json.dumps(value) if isinstance(value, dict) else str(value))


STARTS = {
    "plain": Start(()),
    "full": Start(("--lim-policy", "full")),
    "prefill-elsewhere": Start(
        (),
        backend=(
            *("--prefill-attention-backend", "torch_native"),
            *("--decode-attention-backend", "lim"),
        ),
    ),
    **{
        refusal.option: Start(as_typed(refusal), (refusal.option,))
        for refusal in REFUSALS + CPU_REFUSALS
    },
    "dp-attention": Start(
        ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
        ("--enable-dp-attention",),
    ),
    "ranks": Start(("--tp-size", "2")),
    "unequal-ranks": Start(("--tp-size", "3"), ("--tp-size 3", "4 query heads", "use 1, 2")),
    "drafts-of-ranks": Start(
        ("--tp-size", "2", "--lim-policy", "lossless"), ("--tp-size 2: policy lossless",)
    ),
    "three-at-once": Start(
        ("--enable-mixed-chunk", "--pp-size", "2", "--enable-deterministic-inference"),
        ("--enable-mixed-chunk", "--pp-size 2", "--enable-deterministic-inference"),
    ),
    "scaled-cache": Start(("--kv-cache-dtype", "mxfp8"), ("--kv-cache-dtype mxfp8",)),
    "sliding": Start((), ("sliding-window",), model="sliding"),
    "mla": Start((), ("MLA",), model="mla"),
    "hybrid": Start((), ("sliding-window",), model="hybrid"),
    "option-and-model": Start(("--enable-mixed-chunk",), ("mixed-chunk", "MLA"), model="mla"),
    "layer-beyond": Start(("--lim-select-layers", "2,8"), ("layer 8", "0 to 7")),
    "bad-budget": Start(("--lim-budget", "0"), ("budget must be",)),
    "bad-json": Start(("--lim-config", '{"bugdet": 1}'), ("'bugdet'", "known settings")),
    "flag-without-backend": Start(
        ("--lim-budget", "9"), ("--lim-budget", "--attention-backend lim"), backend=()
    ),
    "prefill-only": Start(
        (),
        ("--prefill-attention-backend lim",),
        backend=(
            *("--prefill-attention-backend", "lim"),
            *("--decode-attention-backend", "torch_native"),
        ),
    ),
}


ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "lim",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
}
NUM_PROMPTS = 2


@dataclass(frozen=True)
class Started:
    """Results of a process with the plugin: parsed command lines and a `sgl.Engine`."""

    found: dict[str, Any]
    trace: Path


@pytest.fixture(scope="module")
def started(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Parse all command lines, then run an engine whose settings come from `LIM_CONFIG` alone."""
    folder, trace = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("trace")
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    lines = [
        [
            *("--model-path", str(folder / start.model), "--device", "cpu"),
            *("--skip-tokenizer-init", *start.backend, *start.options),
        ]
        for start in STARTS.values()
    ]
    given = {
        "command_lines": lines,
        "engine": ENGINE | {"model_path": str(tiny_model)},
        "refused": {"enable_mixed_chunk": True, "pp_size": 2},
        "config": {"budget": BUDGET, "select_layers": SELECT_LAYERS, "ranking": "mass"},
        "prompts": long_prompts()[:NUM_PROMPTS],
        "sampling": {"max_new_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True},
    }
    return Started(
        run_in_process("start", given, clean_environment({"LIM_TRACE": str(trace)})), trace
    )


@pytest.mark.e2e
@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_refused_or_served_in_words(started: Started, name: str) -> None:
    outcome = dict(zip(STARTS, started.found["outcomes"], strict=True))[name]
    words, message = STARTS[name].words, outcome["message"]
    assert outcome["code"] == (2 if words else 0), message
    assert "Traceback" not in message
    assert not [word for word in words if word not in message], message


@pytest.mark.e2e
def test_sglang_and_flashinfer_as_installed_have_the_signatures_that_are_relied_on(
    started: Started,
) -> None:
    assert started.found["decode_stack"] == []
    assert started.found["tensor_cores"] == [False, True]  # as it is, and while we make a backend


@pytest.mark.e2e
def test_a_start_whose_checks_sglang_does_not_call_is_refused_in_words(started: Started) -> None:
    hooked, without_hook = started.found["runners"]
    assert hooked.startswith("AttributeError")  # past the mark: there is no model
    assert without_hook.startswith("ServerError: lim-sglang's checks of options, model and GPU")
    assert "ServerArgs.__post_init__" in without_hook


@pytest.mark.e2e
def test_no_option_of_sglang_is_taken_for_a_wrong_one(started: Started) -> None:
    options = {word for word in started.found["options"] if word.startswith("--")}
    assert len(options) > 400
    ours = {option for option in options if option.startswith("--lim-")}
    assert options - ours - option_names() - RESERVED_OPTIONS.keys() == set()


@pytest.mark.e2e
def test_an_engine_that_selects_by_mass_gives_the_oracles_tokens_and_sets(
    started: Started, tiny_model: Path, tiny_run: Callable[[Prompt], OracleRun]
) -> None:
    by_mass = Oracle(tiny_model, select_layers=SELECT_LAYERS, budget=BUDGET, by_mass=True)
    results = map(Answer.from_result, started.found["engine"]["answers"])
    for prompt, answer in zip(long_prompts(), results, strict=False):
        run = by_mass.generate(prompt, NUM_NEW)
        assert not token_differences(answer.tokens, run.tokens)
        assert not set_differences(kept_sets(started.trace, answer), run.kept)
        # The paper's ranking keeps other tokens, so the test sees whether the setting has effect.
        assert run.kept != tiny_run(prompt).kept


@pytest.mark.e2e
def test_an_engine_names_all_options_that_it_refuses(started: Started) -> None:
    refusal = started.found["engine"]["refusal"]
    assert refusal.startswith("RefusedError")
    assert "--enable-mixed-chunk" in refusal
    assert "--pp-size 2" in refusal
