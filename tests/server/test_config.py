"""The configuration: defaults, JSON, precedence, presets, refusals, and the layers' roles."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from lim_sglang.config import (
    PRESETS,
    WHY_UNDRAFTED,
    Drafts,
    LimConfig,
    ModelShape,
    Preset,
    find_preset,
    parse_layers,
    read_preset,
    resolve_settings,
    with_preset,
)
from lim_sglang.errors import ConfigError
from lim_sglang.policies import POLICIES
from lim_sglang.policies.policy import Role, default_select_layers

QWEN3_4B = ModelShape("qwen3", 36, 2560, 32)
UNKNOWN = ModelShape("qwen3", 28, 1024, 16)


def test_json_comes_back_as_it_went() -> None:
    config = LimConfig(budget=300, sinks=0, recent_ratio=1.0, select_layers=(3, 9))
    assert LimConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("policy", POLICIES)
def test_json_holds_what_the_policy_heeds(policy: str) -> None:
    config = LimConfig(policy=policy, gate="gates" if policy == "seer" else None)
    assert LimConfig.from_json(config.to_json()) == config
    heeded = {field.name for field in fields(POLICIES[policy])}
    assert json.loads(config.to_json()).keys() - {"policy"} <= heeded
    assert heeded <= asdict(config).keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "full", "budget": 9}, "full does not heed budget"),
        ({"policy": "streaming", "recent_ratio": 0.25}, "streaming does not heed recent_ratio"),
        ({"policy": "quest", "select_layers": [2]}, "quest does not heed select_layers"),
        ({"policy": "lessismore", "shared_by": "all"}, "lessismore does not heed shared_by"),
        ({"policy": "quest", "shared_by": "head"}, "one of all, kv_head, query_head, not 'head'"),
        ({"policy": "quest", "budget": 32}, "multiple of 16 of at least 48"),
        ({"policy": "quest", "budget": 100}, "multiple of 16"),
        ({"policy": "delta", "budget": 128}, "multiple of 16 of at least 144"),
        ({"policy": "seer"}, "needs a gate .* --lim-gate, or train one by lim train-gate"),
        ({"policy": "seer", "gate": ""}, "gate must be the folder of a trained gate, not ''"),
        ({"policy": "seer", "gate": "g", "budget": 128}, "multiple of 64 of at least 192"),
        ({"policy": "seer", "gate": "g", "budget": 200}, "multiple of 64"),
        ({"policy": "seer", "gate": "g", "shared_by": "all"}, "seer does not heed shared_by"),
        ({"policy": "quest", "gate": "g"}, "quest does not heed gate"),
        ({"policy": "quest", "budget": 100, "sinks": 4}, "not heed sinks.*multiple of 16"),
        ({"policy": "tidal", "sinks": 4}, "recent_ratio above 0 only"),
        ({"policy": "tidal", "sinks": 65, "budget": 256, "recent_ratio": 0.25}, "65 do not fit"),
        ({"select_layers": [2, 5], "pick_layers": [5, 7]}, "pick_layers and select_layers .* 5:"),
        ({"pick_layers": [1, 7]}, "pick_layers and dense_layers both name 1:"),
        ({"policy": "tidal", "pick_layers": [4]}, "tidal does not heed pick_layers"),
        ({"policy": "lossless", "pick_layers": [4]}, "lossless has no pick_layers"),
        ({"sinks": 5000}, "512 tokens of the budget here: 5000 do not fit"),
        ({"policy": "streaming", "sinks": 64, "budget": 64}, "63 tokens of the budget"),
    ],
)
def test_a_setting_has_to_suit_the_policy(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LimConfig.from_mapping(settings)


def test_defaults_are_the_papers() -> None:
    config = LimConfig()
    assert (config.policy, config.budget, config.recent_ratio) == ("lessismore", 2048, 0.25)
    assert (config.sinks, config.dense_layers, config.select_layers) == (4, (0, 1), None)


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'bugdet'.*known settings: policy, budget"):
        LimConfig.from_json('{"bugdet": 5}')


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("policy", "quests"),
        ("budget", 0),
        ("budget", True),
        ("budget", "64"),
        ("recent_ratio", -0.1),
        ("recent_ratio", 1.01),
        ("recent_ratio", float("nan")),
        ("recent_ratio", "0.5"),
        ("sinks", -1),
        ("select_layers", [12, 2]),
        ("select_layers", [2, 2]),
        ("select_layers", [-1]),
        ("select_layers", "2,12"),
        ("dense_layers", 0),
    ],
)
def test_a_bad_value_is_named(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        LimConfig.from_mapping({setting: value})


def test_a_flag_beats_the_option_which_beats_the_environment() -> None:
    environment = '{"budget": 1, "sinks": 1, "recent_ratio": 0.1}'
    option = '{"budget": 2, "sinks": 2}'
    config = resolve_settings(environment, option, {"budget": 3})
    assert (config.budget, config.sinks, config.recent_ratio) == (3, 2, 0.1)


@pytest.mark.parametrize("text", ["{", "[1]", "7", '"budget"'])
def test_json_that_is_no_object_is_refused_with_its_source_and_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)LIM_CONFIG.*budget"):
        resolve_settings(text, None, {})
    with pytest.raises(ConfigError, match=r"(?s)--lim-config.*budget"):
        resolve_settings(None, text, {})


@pytest.mark.parametrize(
    ("shape", "named", "layers"),
    [
        (QWEN3_4B, None, (2, 20)),  # measured
        (UNKNOWN, None, (2, 9)),  # a third of its depth
        (QWEN3_4B, (), ()),
        (QWEN3_4B, (2, 12), (2, 12)),
    ],
)
def test_layers_that_the_user_named_beat_the_preset_which_beats_the_default(
    shape: ModelShape, named: tuple[int, ...] | None, layers: tuple[int, ...]
) -> None:
    assert with_preset(LimConfig(select_layers=named), shape).select_layers == layers


MEASURED = {
    "shape": asdict(QWEN3_4B),
    "layers": [2, 15],
    "model": "Qwen3-4B-own",
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "fingerprint": None,
}
"""A preset as its file has it."""


def preset_file(folder: Path, content: object) -> str:
    """Write a preset; return its path."""
    path = folder / "preset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_beats_the_preset_of_the_shape(tmp_path: Path) -> None:
    path = preset_file(tmp_path, MEASURED | {"evidence": {"seconds": 3}})
    for policy in ("lessismore", "lossless", "omnikv"):
        config = LimConfig(policy=policy, preset=path)
        found = with_preset(config, QWEN3_4B)
        assert (found.select_layers, found.preset) == ((2, 15), None)
    assert find_preset(LimConfig(preset=path), QWEN3_4B) == Preset(
        (2, 15), "Qwen3-4B-own", 151936, 1e6
    )
    with pytest.raises(ConfigError, match="policy full does not heed preset"):
        LimConfig(policy="full", preset=path)


@pytest.mark.parametrize(
    ("settings", "pick"),
    [
        ({}, (8, 35)),
        ({"pick_layers": ()}, ()),
        ({"pick_layers": (4,)}, (4,)),
        ({"dense_layers": (0, 1, 8), "pick_layers": (4,)}, (4,)),
        # Policies without pick layers are served with the SELECT layers, which were found first.
        *(({"policy": policy}, None) for policy in ("lossless", "omnikv", "tidal", "delta")),
    ],
)
def test_pick_layers_of_a_preset_serve_unless_the_user_named_some(
    settings: dict[str, Any], pick: tuple[int, ...] | None, tmp_path: Path
) -> None:
    path = preset_file(tmp_path, MEASURED | {"pick_layers": [8, 35]})
    found = with_preset(LimConfig(preset=path, **settings), QWEN3_4B)
    assert (found.select_layers, found.pick_layers) == ((2, 15), pick)
    roles = found.make_policy().roles(36)
    assert [n for n, role in enumerate(roles) if role is Role.PICK] == [*(pick or ())]


def test_pick_layers_of_two_roles_are_refused_where_the_preset_is_read(tmp_path: Path) -> None:
    twice = preset_file(tmp_path, MEASURED | {"pick_layers": [8, 15]})
    with pytest.raises(ConfigError, match=r"preset\.json has 15 as SELECT and as pick layers"):
        read_preset(twice)
    config = LimConfig(preset=preset_file(tmp_path, MEASURED | {"pick_layers": [1, 8]}))
    with pytest.raises(ConfigError, match="has the pick layers 1, which dense_layers names: name"):
        with_preset(config, QWEN3_4B)
    assert with_preset(replace(config, dense_layers=(0,)), QWEN3_4B).pick_layers == (1, 8)


@pytest.mark.parametrize("layers", [(), (2, 5)])
def test_layers_beside_a_preset_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="name layers or a preset, not both"):
        LimConfig(preset="/nonexist", select_layers=layers)


@pytest.mark.parametrize("layers", [[35], [34, 35], [40]])
def test_a_preset_whose_sets_no_layer_would_read_is_refused(
    layers: list[int], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="of 36, and no layer above to read their sets"):
        read_preset(preset_file(tmp_path, MEASURED | {"layers": layers}))
    below = preset_file(tmp_path, MEASURED | {"layers": [33, 35]})
    assert read_preset(below)[1].layers == (33, 35)


def test_a_preset_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = LimConfig(preset=preset_file(tmp_path, MEASURED))
    words = (
        r"measured on Qwen3-4B-own \(qwen3, 36 layers of 2560 dimensions and 32 heads\), but the "
        r"model is qwen3, 36 layers of 2560 dimensions and 16 heads: name a preset of this model"
    )
    with pytest.raises(ConfigError, match=words):
        with_preset(config, replace(QWEN3_4B, num_heads=16))


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "{", "[" * 100_000, "null"),
        {name: value for name, value in MEASURED.items() if name != "fingerprint"},
        MEASURED | {"layers": [2, 2]},
        MEASURED | {"layers": []},
        MEASURED | {"layers": "2,12"},
        MEASURED | {"layers": 2},
        MEASURED | {"pick_layers": [8, 4]},
        MEASURED | {"pick_layers": 8},
        MEASURED | {"pick_layers": None},
        MEASURED | {"shape": [36]},
        MEASURED | {"shape": {**asdict(QWEN3_4B), "num_heads": "32"}},
        MEASURED | {"shape": {**asdict(QWEN3_4B), "heads": 32}},
        MEASURED | {"vocab_size": "many"},
        MEASURED | {"rope_theta": math.nan},
        MEASURED | {"fingerprint": 5},
        MEASURED | {"model": None},
    ],
    ids=lambda content: str(content)[-20:],
)
def test_a_damaged_preset_is_refused_with_what_was_expected(
    content: object, tmp_path: Path
) -> None:
    words = (
        "is damaged: expected is a JSON object with shape, layers, model, vocab_size, rope_theta"
    )
    with pytest.raises(ConfigError, match=words):
        read_preset(preset_file(tmp_path, content))


def test_a_preset_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"cannot be read \\({why}.*lim calibrate wrote"):
            read_preset(str(path))


CODER = PRESETS[ModelShape("qwen2", 28, 1536, 12)]


@pytest.mark.parametrize(
    ("preset", "traits", "differences"),
    [
        (CODER, {"vocab_size": 151936, "rope_theta": 1000000.0, "fingerprint": "a"}, []),
        (CODER, {"vocab_size": None, "rope_theta": None}, []),
        (CODER, {"vocab_size": 151936, "rope_theta": 10000}, ["rope theta 10,000 instead of"]),
        (CODER, {"vocab_size": 152064}, ["vocab size 152,064 instead of 151,936"]),
        (replace(CODER, fingerprint="a"), {"fingerprint": "a"}, []),
        (replace(CODER, fingerprint="a"), {"fingerprint": None}, []),
        (replace(CODER, vocab_size=None, rope_theta=None), {"vocab_size": 1, "rope_theta": 1}, []),
        (replace(CODER, fingerprint="a"), {"fingerprint": "b", "rope_theta": 1}, ["rope", "other"]),
    ],
)
def test_a_model_of_a_measured_shape_is_told_from_the_measured_one(
    preset: Preset, traits: Mapping[str, Any], differences: list[str]
) -> None:
    found = preset.differences(traits)
    assert len(found) == len(differences)
    assert all(each.startswith(begun) for each, begun in zip(found, differences, strict=True))


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, ()), (2, ()), (3, (2,)), (4, (2, 3)), (8, (2, 3)), (30, (2, 10))]
)
def test_default_select_layers_lie_within_the_model(depth: int, layers: tuple[int, ...]) -> None:
    assert default_select_layers(depth) == layers


@pytest.mark.parametrize(
    ("text", "layers"), [("", ()), ("2", (2,)), ("2,12", (2, 12)), (" 2, 12 ", (2, 12))]
)
def test_a_layer_list_reads_as_typed(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


def test_a_layer_list_with_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="2,12"):
        parse_layers("two")


@pytest.mark.parametrize(
    ("config", "depth", "expected"),
    [
        (LimConfig(select_layers=(2, 5)), 8, "FFSRRSRR"),
        (LimConfig(select_layers=(0,)), 4, "SFRR"),
        (LimConfig(select_layers=(5,)), 6, "FFFFFS"),
        (LimConfig(select_layers=()), 4, "FFFF"),
        (LimConfig(select_layers=(0, 1, 2, 3)), 4, "SSSS"),
        (LimConfig(select_layers=(2,), dense_layers=()), 5, "FFSRR"),
        (LimConfig(select_layers=(1,), dense_layers=(0, 3)), 5, "FSRFR"),
        (LimConfig(select_layers=(1, 3), dense_layers=(0, 3)), 5, "FSRSR"),
        (LimConfig(select_layers=(2,), pick_layers=(4, 6)), 8, "FFSRPRPR"),
        (LimConfig(select_layers=(4,), pick_layers=(2,)), 6, "FFPRSR"),
        (LimConfig(select_layers=(), pick_layers=(2, 4)), 6, "FFPRPR"),
        (LimConfig(policy="full"), 4, "FFFF"),
        (LimConfig(policy="streaming"), 3, "RRR"),
        (LimConfig(policy="streaming", dense_layers=(0, 1)), 3, "FFR"),
        (LimConfig(policy="quest"), 4, "FFPP"),
        (LimConfig(policy="quest", dense_layers=()), 3, "PPP"),
        (LimConfig(policy="seer", gate="g"), 3, "PPP"),
        (LimConfig(policy="seer", gate="g", dense_layers=(0, 1)), 3, "FFP"),
        (LimConfig(policy="tidal", select_layers=(2, 4)), 6, "FFSRSR"),
        (LimConfig(), 6, "FFSSRR"),
    ],
)
def test_a_role_follows_from_the_layer_lists_and_the_policy(
    config: LimConfig, depth: int, expected: str
) -> None:
    letters = "".join(role.value[0].upper() for role in config.make_policy().roles(depth))
    assert letters == expected


def test_a_pick_layer_that_the_preset_lets_read_everything_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="pick_layers names 3, a SELECT layer of this model"):
        LimConfig(pick_layers=(3, 5)).make_policy().roles(8)


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (name, field.name)
        for name, policy in POLICIES.items()
        for field in fields(policy)
        if field.name.endswith("_layers")
        and (name, field.name) not in {("lossless", "dense_layers"), ("lossless", "pick_layers")}
    ],
)
def test_a_layer_beyond_the_model_is_refused(name: str, policy: str) -> None:
    gate = {"gate": "g"} if policy == "seer" else {}
    config = LimConfig.from_mapping({name: [3, 8], "policy": policy, **gate})
    with pytest.raises(ConfigError, match=rf"{name} names layer 8.*0 to 7"):
        config.make_policy().roles(8)


def test_drafts_are_counted_from_a_time_on_and_added_up() -> None:
    lim = {"cycles": 9, "drafted_tokens": 40, "accepted_tokens": 30}
    lim |= {"accepted_histogram": {"8": 3, "3": 2}, "cycles_by_width": {"1": 4, "9": 5}}
    lim |= {"rows_capped": {"penalty": 2}, "cycles_undrafted": {"short": 4}}
    now = Drafts.of({"internal_states": [{"lim": lim}]})
    assert now is not None
    assert (now.counts(), now.runs) == (lim, 5)
    assert Drafts.of({"internal_states": [{"lim": {"cycles": 0}}]}) is None
    first = Drafts(4, 16, 14, {"8": 1, "6": 0}, {"1": 2, "9": 2}, {}, {"short": 2})
    later = Drafts(5, 24, 16, {"8": 2, "3": 2}, {"1": 2, "9": 3}, {"penalty": 2}, {"short": 2})
    assert now.since(first) == later
    assert first + later == now
    assert now.since(None) == now.since(Drafts(10, 80, 70)) == now  # it was started since
    assert (now + now).describe() == "drafts: 60 of 80 accepted, 7.0 tokens a request and cycle"
    assert Drafts(3).describe() == "drafts: none in 3 cycles"


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({}, {"short": 3}, ": no request was longer than the budget of 1,024 tokens"),
        ({"short": 3, "cost": 2}, {"short": 3, "cost": 9}, ": drafts would not have paid"),
        (
            {"short": 1},
            {"short": 2, "capped": 4},
            ": all requests asked for penalties, a grammar, a logit processor or hidden states, or "
            "no request was longer than the budget of 1,024 tokens",
        ),
        ({}, {"large_batch": 1}, ": more requests ran at a time than drafts are made for"),
        ({}, {"newer": 1}, ": newer"),
        ({"short": 3}, {"short": 3}, ""),
        ({}, {}, ""),
    ],
)
def test_cycles_without_drafts_say_the_reasons_that_the_server_counted(
    before: dict[str, int], now: dict[str, int], reason: str
) -> None:
    lim = {"drafted_tokens": 0, "accepted_tokens": 0, "accepted_histogram": {}}
    lim |= {"config": {"budget": 1024}}
    first, last = (
        Drafts.of({"internal_states": [{"lim": lim | {"cycles": cycles, "cycles_undrafted": why}}]})
        for cycles, why in ((5, before), (12, now))
    )
    assert last
    assert (Drafts() + last.since(first)).describe() == f"drafts: none in 7 cycles{reason}"


def test_every_reason_that_a_server_counts_has_its_words() -> None:
    worker = Path(__file__).parents[2] / "lim_sglang/lossless/worker.py"
    counted = re.findall(r'count_undrafted\("(\w+)"\)', worker.read_text())
    assert set(counted) == set(WHY_UNDRAFTED)
