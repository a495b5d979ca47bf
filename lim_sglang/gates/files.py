"""Gates as they are published: a folder with `config.json` and `attn_gate_weights.pth`.

torch is imported only by the functions that read or write weights.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lim_sglang.errors import ConfigError, bullets, reasons_that_hold

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.reference_rivals import BlockGate

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "attn_gate_weights.pth"
BLOCK = 64
"""Tokens of a block."""

logger = logging.getLogger(__name__)

_PREFIX = "seerattn_"
_SERVED: Mapping[str, Any] = {
    "gate_block_size": BLOCK,
    "k_seq_pooling_type": "Kmaxminavg",
    "q_head_pooling_type": "Qproj",
    "use_rope": True,
}
"""Settings of which only one value is served, the published default."""
_PARTS = {
    "query_weight": "attngate_linear_q.weight",
    "key_weight": "attngate_linear_k.weight",
    "query_norm": "attngate_qnorm.weight",
    "key_norm": "attngate_knorm.weight",
}
"""Fields of `BlockGate`, and the names of their weights in the file."""
_FIELDS = {part: field for field, part in _PARTS.items()}
_NORMS = ("query_norm", "key_norm")
_KEY = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.self_attn\.attn_gate\.(.+)")
_SIZES = {
    "layers": "num_hidden_layers",
    "KV heads": "num_key_value_heads",
    "dimensions of a head": "head_dim",
    "dimensions of the hidden state": "hidden_size",
}
"""Sizes of a model, and their keys in `config.json`."""
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
"""Keys of `config.json` that describe RoPE, beside `rope_theta`."""
_ANOTHER = "name a gate of this model (lim train-gate makes one)"
_MOST_SHOWN = 8
"""Reasons that one message lists."""


@dataclass(frozen=True)
class _GateConfig:
    """Settings of a gate whose `config.json` can be served."""

    stated: Mapping[str, Any]
    """All of the file; published files repeat the model's own configuration."""
    gate_dim: int | None
    has_norms: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `BlockGate` that each layer has."""
        return tuple(field for field in _PARTS if self.has_norms or field not in _NORMS)


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of a gate's weights, which tells a gate from all others.

    Raises:
        ConfigError: the folder holds no weights.
    """
    return hashlib.sha256(_read_weights(folder / WEIGHTS_FILE)).hexdigest()


def folder_of(gate: str) -> Path:
    """Return the folder that a setting names; the `~` of an unknown user stays as it is."""
    return Path(os.path.expanduser(gate))


def read_gates(folder: Path) -> "tuple[BlockGate, ...]":
    """Read the gate of each layer, on the CPU in the stored dtype.

    Raises:
        ConfigError: the folder holds no gate that can be served, with the reasons.
    """
    return read_gates_and_digest(folder)[0]


def read_gates_and_digest(folder: Path) -> "tuple[tuple[BlockGate, ...], str]":
    """Read the gates as `read_gates`, and the digest of the same bytes as `weights_digest`."""
    config = _read_config(folder)
    file = folder / WEIGHTS_FILE
    archive = _read_weights(file)
    layers = _sort_by_layer(folder, _load_weights(file, archive), config)
    return _make_gates(folder, layers, config), hashlib.sha256(archive).hexdigest()


def reasons_against_gate(folder: Path, model_config: Any) -> list[str]:
    """List the reasons why a gate does not belong to a model.

    Weights are read only if `config.json` gives no reason, since torch takes seconds to import. A
    base model of another name is logged only: a copy may have any name.

    Args:
        folder: the gate's folder.
        model_config: the model's Hugging Face text configuration.

    Returns:
        one line for each reason; the one `ConfigError` of `read_gates` if there is no gate.
    """
    try:
        config = _read_config(folder)
        if reasons := _reasons_of_config(config, model_config):
            return reasons
        _warn_of_another_name(config, model_config)
        gates = read_gates(folder)
    except ConfigError as error:
        return [str(error)]
    groups, group, dim, _ = gates[0].query_weight.shape
    found = {"layers": len(gates), "KV heads": groups, "query heads of a KV head": group}
    return _differences(found | {"dimensions of a head": dim}, _shape(model_config))


def write_gates(folder: Path, gates: "Sequence[BlockGate]", config: Mapping[str, Any]) -> None:
    """Write gates in the published format; each file appears whole, `config.json` last.

    Args:
        folder: made if it is missing; a gate that it holds is replaced.
        gates: one for each layer, kept in the dtype that they have.
        config: further keys of `config.json`, such as `base_model`. The gate's own settings,
            `seerattn_…`, are those of the gates.

    Raises:
        ConfigError: the gates could not be read back, with the reasons; nothing is written.
        OSError: the folder cannot be written.
    """
    if not gates:
        raise ConfigError("there is no gate to write: give one for each layer")
    weights = {}
    for layer, gate in enumerate(gates):
        if gate.block != BLOCK:
            raise ConfigError(f"layer {layer} has blocks of {gate.block} tokens, expected {BLOCK}")
        for field, part in _PARTS.items():
            if (weight := getattr(gate, field)) is not None:
                # A copy, since a view would be stored with all of its memory.
                key = f"model.layers.{layer}.self_attn.attn_gate.{part}"
                weights[key] = weight.detach().cpu().clone().contiguous()
    settings = dict(_SERVED) | {
        "gate_hidden_size": gates[0].query_weight.shape[-1],
        "use_qk_norm": gates[0].query_norm is not None,
    }
    content = dict(config) | {f"{_PREFIX}{name}": value for name, value in settings.items()}
    _check_tensors(folder / WEIGHTS_FILE, weights)
    checked = _check_config(folder / CONFIG_FILE, content)
    _make_gates(folder, _sort_by_layer(folder, weights, checked), checked)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS_FILE, archived(weights))
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / CONFIG_FILE, text.encode())


def archived(content: object) -> bytes:
    """Return tensors and plain values as a torch archive."""
    import torch

    archive = io.BytesIO()
    torch.save(content, archive)
    return archive.getvalue()


def load_archive(archive: bytes) -> Any:
    """Load a torch archive of tensors and plain values on the CPU; no code of the archive runs.

    Raises:
        ValueError: in words, why the archive cannot be loaded.
    """
    import torch

    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - of many kinds; torch's words advise to run the code
        reason = "it is damaged, or holds Python objects, whose code is never run"
        raise ValueError(reason) from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a draft beside a file, then put the draft in the file's place.

    A reader, and a process that goes on after a crash, finds the old file or the new one.

    Raises:
        OSError: the folder cannot be written.
    """
    draft = path.with_name(f"{path.name}.new")
    try:
        draft.write_bytes(content)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _read_config(folder: Path) -> _GateConfig:
    """Read `config.json` and check the gate's settings."""
    return _check_config(folder / CONFIG_FILE, _read_object(folder))


def _check_config(file: Path, stated: Mapping[str, Any]) -> _GateConfig:
    """Check the gate's settings in the content of `config.json`, all at once."""
    names = {name.removeprefix(_PREFIX) for name in stated if name.startswith(_PREFIX)}
    if not names:
        raise ConfigError(
            f"{file} has no key that begins with {_PREFIX}: it belongs to no gate; "
            "name the folder of a SeerAttention-R gate, not of a model"
        )
    given = {name: stated[f"{_PREFIX}{name}"] for name in names}
    reasons = [
        f"{_PREFIX}{name} is {json.dumps(found)}, expected {json.dumps(expected)}"
        for name, expected in _SERVED.items()
        if type(found := given.get(name, expected)) is not type(expected) or found != expected
    ]
    gate_dim, has_norms = given.get("gate_hidden_size"), given.get("use_qk_norm", False)
    if gate_dim is not None and (type(gate_dim) is not int or gate_dim < 1):
        reasons.append(f"{_PREFIX}gate_hidden_size is {json.dumps(gate_dim)}, expected a number")
    if type(has_norms) is not bool:
        reasons.append(f"{_PREFIX}use_qk_norm is {json.dumps(has_norms)}, expected true or false")
    reasons += [
        f"{key} is {json.dumps(found)}, expected a number"
        for key in _SIZES.values()
        if type(found := stated.get(key)) not in (int, type(None))
    ]
    reasons += [
        f"{key} is {json.dumps(found)}, expected an object or null"
        for key in _ROPE_KEYS
        if not isinstance(found := stated.get(key), dict | None)
    ]
    if start := given.get("start_layer"):
        reasons.append(
            f"{_PREFIX}start_layer is {json.dumps(start)}, which is not heeded: set it to 0, and "
            "name the layers below by dense_layers in --lim-config"
        )
    method = given.get("sparsity_method") or "token_budget"
    # The authors' code saves `threshold` beside 0.0, which drops no block, as its defaults.
    keeps_all = method == "threshold" and given.get("threshold") == 0
    if method != "token_budget" and not keeps_all:
        reasons.append(
            f"{_PREFIX}sparsity_method is {json.dumps(method)}, which is not served: set it to "
            '"token_budget", and give the tokens by --lim-budget'
        )
    if reasons:
        _refuse(file, reasons, "use a gate that was trained with these settings")
    return _GateConfig(stated, gate_dim, has_norms)


def _read_object(folder: Path) -> Mapping[str, Any]:
    """Return the object in a folder's `config.json`."""
    file = folder / CONFIG_FILE
    if not os.path.isdir(folder):  # `Path.is_dir` raises an error for a name that is too long
        raise ConfigError(f"{folder} is no folder: name the folder of a SeerAttention-R gate")
    if not file.is_file():
        raise ConfigError(
            f"{folder} holds no {CONFIG_FILE}: a gate's folder has {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no JSON ({error}): fetch the gate again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _read_weights(file: Path) -> bytes:
    """Return the bytes of a weights file."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{file.parent} holds no {WEIGHTS_FILE}: fetch the gate's weights, in the format of "
            "torch.save"
        ) from None
    except (OSError, ValueError) as error:  # the latter: a name with the character NUL
        raise ConfigError(f"{file} cannot be read ({error}): name a gate's folder") from None


def _load_weights(file: Path, archive: bytes) -> "dict[str, Tensor]":
    """Load the tensors of a torch archive by name; no code of the archive runs.

    The file is read, not mapped: a file that is cut off later would end the process.
    """
    try:
        content = load_archive(archive)
    except ValueError as error:
        raise ConfigError(
            f"{file} is no torch archive of tensors alone ({error}): fetch the gate again"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold named tensors, not a {type(content).__name__}")
    _check_tensors(file, content)
    return content


def _check_tensors(file: Path, content: Mapping[Any, Any]) -> None:
    """Refuse what is no dense float tensor with a name."""
    import torch

    reasons = [
        f"{name!r} is a {_kind(value)}, expected a dense float tensor"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
        or not value.is_floating_point()
        or value.layout != torch.strided
        or value.is_meta
    ]
    if reasons:
        _refuse(file, reasons, "fetch the gate again")


def _kind(value: object) -> str:
    """Return the type of a value, of a tensor with its dtype."""
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return f"{type(value).__name__} of {dtype}" if dtype else type(value).__name__


def _sort_by_layer(
    folder: Path, weights: "Mapping[str, Tensor]", config: _GateConfig
) -> "list[dict[str, Tensor]]":
    """Return the weights of each layer by the field of `BlockGate`."""
    layers: dict[int, dict[str, Tensor]] = {}
    reasons = []
    for name, weight in weights.items():
        match = _KEY.fullmatch(name)
        field = _FIELDS.get(match[2]) if match else None
        if match is None or field not in config.fields:
            reasons.append(f"{name} is unknown{_hint(field)}")
        else:
            layers.setdefault(int(match[1]), {})[field] = weight
    stated = config.stated.get("num_hidden_layers")
    depth = max([*layers, 0]) + 1
    if type(stated) is int:
        depth = max(depth, min(stated, depth + _MOST_SHOWN))
    for layer in range(depth):
        missing = [_PARTS[field] for field in config.fields if field not in layers.get(layer, {})]
        if len(missing) == len(config.fields):
            reasons.append(f"layer {layer} is missing")
        elif missing:
            reasons.append(f"layer {layer} lacks {', '.join(missing)}")
    if reasons:
        _refuse(
            folder / WEIGHTS_FILE,
            reasons,
            "each layer has the keys model.layers.{i}.self_attn.attn_gate.{part} with the parts "
            + ", ".join(_PARTS[field] for field in config.fields),
        )
    return [layers[layer] for layer in range(depth)]


def _hint(field: str | None) -> str:
    """Return why a known part of a gate is not expected."""
    return f", since {_PREFIX}use_qk_norm is false" if field in _NORMS else ""


def _make_gates(
    folder: Path, layers: "Sequence[Mapping[str, Tensor]]", config: _GateConfig
) -> "tuple[BlockGate, ...]":
    """Make the gates of all layers, whose weights must be finite and fit each other."""
    from lim_sglang.kernels.reference_rivals import BlockGate

    gates, reasons = [], []
    for layer, weights in enumerate(layers):
        reasons += [
            f"layer {layer}: {_PARTS[field]} is empty, or has a weight that is NaN or infinite"
            for field, weight in weights.items()
            if not weight.numel() or not weight.float().isfinite().all()
        ]
        try:
            gates.append(BlockGate(**weights, block=BLOCK))
        except ValueError as error:
            reasons.append(f"layer {layer}: {error}")
    shapes = {tuple(gate.query_weight.shape) for gate in gates}
    if len(shapes) > 1:
        reasons.append(f"layers have query weights of different shapes, {sorted(shapes)}")
    for shape in shapes:
        if config.gate_dim not in (None, shape[-1]):
            reasons.append(
                f"the weights end in {shape[-1]} dimensions, "
                f"{_PREFIX}gate_hidden_size is {config.gate_dim}"
            )
    if reasons:
        _refuse(folder / WEIGHTS_FILE, reasons, "use a complete gate of one model")
    return tuple(gates)


def _refuse(file: Path, reasons: Iterable[str], advice: str) -> NoReturn:
    """Raise a `ConfigError` with the first reasons."""
    rest = iter(reasons)
    shown = list(islice(rest, _MOST_SHOWN))
    if more := sum(1 for _ in rest):
        shown.append(f"and {more} more")
    raise ConfigError(f"{file} holds no gate that can be served; {advice}:{bullets(shown)}")


def _shape(model_config: Any) -> dict[str, int]:
    """Return the sizes of a model that its gates depend on."""
    heads = model_config.num_attention_heads
    groups = getattr(model_config, "num_key_value_heads", None) or heads
    return {
        "layers": model_config.num_hidden_layers,
        "KV heads": groups,
        "query heads of a KV head": heads // groups,
        "dimensions of a head": getattr(model_config, "head_dim", None)
        or model_config.hidden_size // heads,
    }


def _reasons_of_config(config: _GateConfig, model_config: Any) -> list[str]:
    """List what `config.json`, and the model alone, say against a gate."""
    stated = {what: config.stated.get(key) for what, key in _SIZES.items()}
    stated["dimensions of a head"] = config.gate_dim or stated["dimensions of a head"]
    hidden = {"dimensions of the hidden state": model_config.hidden_size}
    reasons = reasons_against_rotary_dim(model_config)
    reasons += _differences(stated, _shape(model_config) | hidden)
    found, expected = _traits(config.stated), _traits(vars(model_config))
    return reasons + [
        f"the gate was trained with {name} {json.dumps(found[name])}, the model has "
        f"{json.dumps(expected[name])}: {_ANOTHER}"
        for name in found
        if name in expected and found[name] != expected[name]
    ]


def _traits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kind of a model and its RoPE, as far as a configuration states them.

    RoPE is stated by `rope_theta` and `rope_scaling`, or by `rope_parameters`.
    """
    found: dict[str, Any] = {}
    for name in _ROPE_KEYS:
        if name in config:
            found = {"rope_type": "default"} | found | dict(config[name] or {})
    if kind := found.pop("type", None):
        found["rope_type"] = kind
    found = {"rope_theta": config.get("rope_theta"), "model_type": config.get("model_type")} | found
    return {name: value for name, value in found.items() if value is not None}


def _warn_of_another_name(config: _GateConfig, model_config: Any) -> None:
    """Log that a gate names another base model than the one that is served."""
    names = config.stated.get("base_model"), getattr(model_config, "_name_or_path", None)
    trained, served = (Path(name).name if isinstance(name, str) else "" for name in names)
    if trained and served and trained != served:
        logger.warning(
            "the gate was trained for %s, served is %s: make sure that they are one model",
            *names,
        )


def _differences(found: Mapping[str, int | None], expected: Mapping[str, int]) -> list[str]:
    """Compare sizes of a gate, where they are known, with those of the model."""
    return [
        f"the gate was trained for {number} {what}, the model has {expected[what]}: {_ANOTHER}"
        for what, number in found.items()
        if number not in (None, expected[what])
    ]


def reasons_against_rotary_dim(model_config: Any) -> list[str]:
    """Return one reason if the model's RoPE leaves dimensions of a head as they are."""
    dim = _shape(model_config)["dimensions of a head"]
    rotary_dim = _rotary_dim(model_config, dim)
    return reasons_that_hold(
        (
            rotary_dim != dim,
            f"the model's RoPE turns {rotary_dim} of {dim} dimensions of a head, expected all: "
            "serve another policy",
        )
    )


def _rotary_dim(model_config: Any, head_dim: int) -> int:
    """Return the dimensions of a head that the model's RoPE turns."""
    sources: list[Mapping[str, Any]] = [vars(model_config)]
    for name in _ROPE_KEYS:
        if isinstance(settings := getattr(model_config, name, None), Mapping):
            sources.append(settings)
    for source in sources:
        if isinstance(rotary_dim := source.get("rotary_dim"), int):
            return rotary_dim
        if (factor := source.get("partial_rotary_factor")) is not None:
            return int(head_dim * factor)
    return head_dim
