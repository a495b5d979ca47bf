"""Files of gates: what is written reads back, and what cannot be served is refused in words."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lim_sglang.config import LimConfig
from lim_sglang.errors import ConfigError
from lim_sglang.gates import files
from lim_sglang.gates.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    folder_of,
    read_gates,
    reasons_against_gate,
    weights_digest,
    write_gates,
)
from lim_sglang.kernels.reference_rivals import BlockGate

LAYERS, G, GROUP, D = 3, 2, 3, 8
MODEL = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": G * GROUP,
    "num_key_value_heads": G,
    "head_dim": D,
    "hidden_size": 40,
}
KEY = "model.layers.{}.self_attn.attn_gate.attngate_{}.weight"
Weights = dict[Any, Any]


def draw_gates(has_norms: bool = True, dtype: torch.dtype = torch.bfloat16) -> list[BlockGate]:
    """Draw a gate for each layer."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    def norm() -> Tensor | None:
        return draw(D) if has_norms else None

    return [
        BlockGate(draw(G, GROUP, D, D), draw(G, 3 * D, D), norm(), norm()) for _ in range(LAYERS)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a gate as published."""
    write_gates(tmp_path, draw_gates(), {"base_model": "some/model"})
    return tmp_path


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    """Change keys of a gate's `config.json`; None removes one."""
    file = folder / CONFIG_FILE
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_norms", [True, False])
def test_written_gates_read_back_equal(has_norms: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    gates = draw_gates(has_norms, dtype)
    folder = tmp_path / "new" / "folder"
    write_gates(folder, gates, {"base_model": "some/model"})
    found = read_gates(folder)
    assert len(found) == LAYERS
    for gate, expected in zip(found, gates, strict=True):
        for name in ("query_weight", "key_weight", "query_norm", "key_norm"):
            weight, other = getattr(gate, name), getattr(expected, name)
            assert (weight is None) == (other is None) == (not has_norms and "norm" in name)
            assert weight is None or (torch.equal(weight, other) and weight.dtype == dtype)
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]


def test_the_format_is_the_published_one(folder: Path) -> None:
    parts = ("linear_q", "linear_k", "qnorm", "knorm")
    weights = torch.load(folder / WEIGHTS_FILE, weights_only=True)
    assert set(weights) == {KEY.format(i, part) for i in range(LAYERS) for part in parts}
    assert [list(weights[KEY.format(2, part)].shape) for part in parts] == [
        [G, GROUP, D, D],
        [G, 3 * D, D],
        [D],
        [D],
    ]
    assert json.loads((folder / CONFIG_FILE).read_text()) == {
        "base_model": "some/model",
        "seerattn_gate_block_size": 64,
        "seerattn_gate_hidden_size": D,
        "seerattn_k_seq_pooling_type": "Kmaxminavg",
        "seerattn_q_head_pooling_type": "Qproj",
        "seerattn_use_qk_norm": True,
        "seerattn_use_rope": True,
    }


def test_settings_that_are_left_out_have_the_published_defaults(tmp_path: Path) -> None:
    write_gates(tmp_path, draw_gates(has_norms=False), {})
    names = ("gate_hidden_size", "k_seq_pooling_type", "use_rope", "use_qk_norm")
    change_config(tmp_path, {f"seerattn_{name}": None for name in names})
    assert read_gates(tmp_path)[0].key_norm is None


def test_only_a_views_own_values_are_stored(tmp_path: Path) -> None:
    whole = torch.zeros(1000, D)
    gate = BlockGate(torch.ones(1, 1, D, D), torch.ones(1, 3 * D, D), whole[0], whole[1])
    write_gates(tmp_path, [gate], {})
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 8000


def test_a_failed_write_leaves_the_gate_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_file: int) -> None:
        raise OSError("no space left")

    expected = read_gates(folder)
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_gates(folder, draw_gates(has_norms=False), {})
    assert torch.equal(read_gates(folder)[1].key_weight, expected[1].key_weight)
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ([], "no gate to write"),
        ([draw_gates()[0], draw_gates(has_norms=False)[0]], "layer 1 lacks attngate_qnorm.weight"),
        ([draw_gates(has_norms=False)[0], draw_gates()[0]], "qnorm.weight is unknown, since"),
        ([replace(draw_gates()[0], key_norm=torch.full((D,), torch.nan))], "weight that is NaN"),
        ([BlockGate(torch.ones(1, 1, D, D).int(), torch.ones(1, 3 * D, D))], "Tensor of int32"),
        ([BlockGate(torch.ones(1, 1, D, D), torch.ones(1, 3 * D, D), block=32)], "blocks of 32"),
    ],
)
def test_gates_that_could_not_be_read_are_not_written(
    gates: list[BlockGate], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        write_gates(tmp_path / "gate", gates, {})
    with pytest.raises(ConfigError, match="layer 1 is missing"):
        write_gates(tmp_path / "gate", draw_gates()[:1], {"num_hidden_layers": 2})
    assert not (tmp_path / "gate").exists()


CONFIG_REFUSALS: list[tuple[Any, str]] = [
    ({"seerattn_gate_block_size": 32}, "seerattn_gate_block_size is 32, expected 64"),
    ({"seerattn_gate_block_size": "64"}, 'seerattn_gate_block_size is "64", expected 64'),
    ({"seerattn_k_seq_pooling_type": "Kmax"}, 'is "Kmax", expected "Kmaxminavg"'),
    ({"seerattn_q_head_pooling_type": "Qavgproj"}, 'is "Qavgproj", expected "Qproj"'),
    ({"seerattn_use_rope": False}, "seerattn_use_rope is false, expected true"),
    ({"seerattn_use_qk_norm": "yes"}, 'seerattn_use_qk_norm is "yes", expected true or false'),
    ({"seerattn_gate_hidden_size": 0}, "seerattn_gate_hidden_size is 0, expected a number"),
    ({"seerattn_gate_hidden_size": 16}, "end in 8 dimensions, seerattn_gate_hidden_size is 16"),
    ({"seerattn_use_qk_norm": False}, "qnorm.weight is unknown, since seerattn_use_qk_norm is fal"),
    ({"num_hidden_layers": 4}, "layer 3 is missing"),
    ({"num_hidden_layers": "3"}, 'num_hidden_layers is "3", expected a number'),
    ({"head_dim": 8.0}, "head_dim is 8.0, expected a number"),
    ({"seerattn_use_rope": 1}, "seerattn_use_rope is 1, expected true"),
    ({"seerattn_start_layer": 2}, "start_layer is 2, which is not heeded: set it to 0, and name"),
    ({"seerattn_sparsity_method": "threshold"}, 'set it to "token_budget", and give the tokens'),
    (
        {"seerattn_sparsity_method": "threshold", "seerattn_threshold": 0.001},
        'sparsity_method is "threshold", which is not served',
    ),
    ({"seerattn_sparsity_method": "top_p"}, 'sparsity_method is "top_p", which is not served'),
    ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn", expected an object or null'),
    ({"rope_parameters": 5}, "rope_parameters is 5, expected an object or null"),
]


@pytest.mark.parametrize(("changes", "words"), CONFIG_REFUSALS)
def test_other_settings_are_refused(changes: dict[str, Any], words: str, folder: Path) -> None:
    change_config(folder, changes)
    with pytest.raises(ConfigError) as refused:
        read_gates(folder)
    assert words in str(refused.value)


def test_defaults_that_the_authors_code_saves_are_accepted(folder: Path) -> None:
    saved = {"start_layer": 0, "sparsity_method": "threshold", "threshold": 0.0}
    change_config(folder, {f"seerattn_{name}": value for name, value in saved.items()})
    assert len(read_gates(folder)) == LAYERS


def test_all_wrong_settings_are_named_at_once(folder: Path) -> None:
    change_config(folder, {"seerattn_use_rope": False, "seerattn_gate_block_size": 16})
    with pytest.raises(ConfigError, match=r"(?s)block_size is 16.*use_rope is false"):
        read_gates(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "must hold a JSON object, not a list"),
        (b'{"model_type": "qwen3"}', "no key that begins with seerattn_"),
        (None, "holds no config.json"),
    ],
)
def test_a_wrong_config_file_is_refused(content: bytes | None, words: str, folder: Path) -> None:
    file = folder / CONFIG_FILE
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_gates(folder)


@pytest.mark.parametrize("name", ["nowhere", "~nosuch/x", "x" * 5000, "a\0b"])
def test_a_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no folder: name the folder of a Seer"):
        read_gates(folder_of(name))
    with pytest.raises(ConfigError, match=r"weights, in the format|cannot be read"):
        weights_digest(folder_of(name))
    seer = LimConfig(policy="seer", gate=name).make_policy()
    (reason,) = seer.reasons_against_model(SimpleNamespace(**MODEL))
    assert "is no folder" in reason


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "holds no attn_gate_weights.pth"),
        (lambda file: file.write_bytes(b""), "no torch archive of tensors alone"),
        (lambda file: file.write_bytes(b"PK\x03\x04 no archive"), "no torch archive"),
        (lambda file: file.write_bytes(file.read_bytes()[:-500]), "no torch archive"),
        (
            lambda file: torch.save({"a": Path("x")}, file),
            r"\(it is damaged, or holds Python objects, whose code is never run\): fetch the gate",
        ),
        (lambda file: torch.save([torch.ones(2)], file), "must hold named tensors, not a list"),
        (lambda file: torch.save({}, file), "layer 0 is missing"),
    ],
    ids=["missing", "empty", "no archive", "cut off", "an object", "a list", "none"],
)
def test_files_that_are_no_archive_of_tensors_are_refused(
    damage: Callable[[Path], object], words: str, folder: Path
) -> None:
    damage(folder / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match=words):
        read_gates(folder)


def test_weights_in_the_old_format_of_torch_are_read(folder: Path) -> None:
    expected = read_gates(folder)
    weights = torch.load(folder / WEIGHTS_FILE, weights_only=True)
    torch.save(weights, folder / WEIGHTS_FILE, _use_new_zipfile_serialization=False)
    assert torch.equal(read_gates(folder)[2].query_weight, expected[2].query_weight)


def test_a_gate_that_is_read_outlives_its_file(folder: Path) -> None:
    """Mapped weights would end the process at the next access."""
    gates = read_gates(folder)
    (folder / WEIGHTS_FILE).write_bytes(b"")
    assert torch.equal(gates[0].key_weight, draw_gates()[0].key_weight)


def put(layer: int, part: str, value: Any) -> Callable[[Weights], object]:
    """Return a change of one weight."""
    return lambda weights: weights.update({KEY.format(layer, part): value})


def drop(*names: str) -> Callable[[Weights], object]:
    """Return a removal of weights."""
    return lambda weights: [weights.pop(name) for name in names]


def not_finite(value: float) -> Tensor:
    """Return weights of a norm, one of which is not finite."""
    return torch.tensor([1.0] * (D - 1) + [value], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.update({"lm_head.weight": torch.ones(2)}), "lm_head.weight is unknown"),
        (put(0, "linear_v", torch.ones(2)), "attn_gate.attngate_linear_v.weight is unknown"),
        (
            lambda w: w.update({1: torch.ones(2)}),
            "1 is a Tensor of float32, expected a dense float tensor",
        ),
        (put(0, "qnorm", 1.0), "is a float, expected a dense float tensor"),
        (put(0, "qnorm", torch.ones(D, dtype=torch.int64)), "is a Tensor of int64, expected a den"),
        (put(0, "qnorm", torch.ones(D).to_sparse()), "expected a dense float tensor"),
        (drop(KEY.format(1, "knorm")), "layer 1 lacks attngate_knorm.weight"),
        (
            drop(*(KEY.format(1, part) for part in ("linear_q", "linear_k", "qnorm", "knorm"))),
            "layer 1 is missing",
        ),
        (put(90, "linear_q", torch.ones(G, GROUP, D, D)), "and 80 more"),
        (put(1, "linear_q", torch.ones(GROUP, D, D)), "layer 1: query_weight must be"),
        (put(1, "linear_q", torch.ones(G, GROUP, D, 2 * D)), "layer 1: the gate's weights do not"),
        (put(1, "linear_k", torch.ones(G, 2 * D, D)), r"key_weight must be \[2, 24, 8\]"),
        (
            put(1, "linear_q", torch.ones(G, 1, D, D)),
            "layers have query weights of different shape",
        ),
        (put(2, "knorm", not_finite(float("nan"))), "layer 2: attngate_knorm.weight is empty, or"),
        (put(2, "knorm", not_finite(float("-inf"))), "has a weight that is NaN or infinite"),
    ],
)
def test_wrong_weights_are_refused(
    change: Callable[[Weights], object], words: str, folder: Path
) -> None:
    weights = torch.load(folder / WEIGHTS_FILE, weights_only=True)
    change(weights)
    torch.save(weights, folder / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match=words):
        read_gates(folder)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"_name_or_path": "another/model"}, []),
        ({"head_dim": None, "hidden_size": G * GROUP * D}, []),
        ({"num_hidden_layers": 4}, ["trained for 3 layers, the model has 4"]),
        ({"num_key_value_heads": 3}, ["2 KV heads, the model has 3", "3 query heads of a KV head"]),
        ({"num_attention_heads": 4}, ["3 query heads of a KV head, the model has 2"]),
        ({"head_dim": 16}, ["8 dimensions of a head, the model has 16"]),
        ({"partial_rotary_factor": 0.5}, ["RoPE turns 4 of 8 dimensions of a head"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ["RoPE turns 2 of 8"]),
        ({"rope_scaling": {"rotary_dim": 2}}, ["RoPE turns 2 of 8"]),
        ({"rope_parameters": {"rope_theta": 1e6}, "partial_rotary_factor": 1.0}, []),
    ],
)
def test_a_gate_of_another_model_is_refused(
    changes: dict[str, Any], reasons: list[str], folder: Path
) -> None:
    found = reasons_against_gate(folder, SimpleNamespace(**MODEL | changes))
    assert len(found) == len(reasons)
    for line, words in zip(found, reasons, strict=True):
        assert words in line
        assert "\n" not in line


THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("stated", "served", "reasons"),
    [
        ({"model_type": "qwen3"}, {"model_type": "qwen3"}, []),
        ({"model_type": "qwen3"}, {}, []),
        (
            {"model_type": "qwen3"},
            {"model_type": "llama"},
            ['model_type "qwen3", the model has "l'],
        ),
        ({"rope_theta": 1000000}, THETA, []),
        ({"rope_theta": 1e4}, THETA, ["rope_theta 10000.0, the model has 1000000.0"]),
        (THETA, {"rope_theta": 1e4, "rope_scaling": None}, ["rope_theta 1000000.0, the model"]),
        ({"rope_theta": 1e6, "rope_scaling": None}, THETA, []),
        (
            {"rope_theta": 1e6, "rope_scaling": YARN},
            {"rope_parameters": YARN | {"rope_theta": 1e6, "rope_type": "yarn"}},
            [],
        ),
        (
            {"rope_scaling": None},
            {"rope_scaling": YARN},
            ['rope_type "default", the model has "ya'],
        ),
        (
            {"rope_scaling": YARN},
            {"rope_scaling": YARN | {"factor": 2.0}},
            ["factor 4.0, the model has 2.0"],
        ),
        (THETA, THETA | {"rope_scaling": YARN}, ['rope_type "default", the model has "yarn"']),
    ],
)
def test_a_gate_of_another_kind_of_model_or_rope_is_refused(
    stated: dict[str, Any], served: dict[str, Any], reasons: list[str], folder: Path
) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    found = reasons_against_gate(folder, SimpleNamespace(**MODEL | served))
    assert len(found) == len(reasons)
    for line, words in zip(found, reasons, strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("name", "is_warned"), [("other/model", False), ("/m/model", False), ("some/other", True)]
)
def test_a_base_model_of_another_name_is_logged(
    name: str, is_warned: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = SimpleNamespace(**MODEL, _name_or_path=name)
    assert reasons_against_gate(folder, model) == []
    expected = f"the gate was trained for some/model, served is {name}: make sure"
    assert (expected in caplog.text) == is_warned


def test_sizes_that_config_json_states_are_compared_without_the_weights(folder: Path) -> None:
    change_config(folder, {"hidden_size": 48, "num_key_value_heads": 4})
    (folder / WEIGHTS_FILE).unlink()
    found = reasons_against_gate(folder, SimpleNamespace(**MODEL))
    assert ["KV heads" in found[0], "hidden state" in found[1], len(found)] == [True, True, 2]


def test_a_wrong_folder_is_one_reason(tmp_path: Path) -> None:
    found = reasons_against_gate(tmp_path, SimpleNamespace(**MODEL))
    with pytest.raises(ConfigError) as refused:
        read_gates(tmp_path)
    assert found == [str(refused.value)]


def test_the_modules_of_the_command_line_import_no_torch() -> None:
    program = "import sys, lim_sglang.gates.files, lim_sglang.gates.training as t; "
    shown = subprocess.run(
        [sys.executable, "-c", program + "print({'torch', 'transformers'} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "set()\n"
