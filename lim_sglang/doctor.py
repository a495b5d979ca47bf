"""`lim doctor`: what is installed, and what would keep LessIsMore from being served."""

import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, entry_points, version

import typer

from lim_sglang.compat import (
    CPU_ENGINE_VAR,
    FLASHINFER_VERSION,
    SGLANG_VERSION,
    reasons_against_decode_stack,
    reasons_against_version,
)
from lim_sglang.config import ENV_VAR, LimConfig
from lim_sglang.errors import ConfigError, LimError
from lim_sglang.validation import BACKEND, reasons_against_environment

GROUPS = ("sglang.srt.plugins", "sglang.srt.platforms")
PACKAGES = ("torch", "triton", "flashinfer-python", "transformers", "openai", "datasets")


class Verdict(Enum):
    """How a finding is marked."""

    OK = "ok"
    NOTE = "note"
    OFF = "OFF"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    text: str


def doctor() -> None:
    """Check installation and environment, one line each; exit code 1 if something is off."""
    found_off = False
    for finding in examine():
        typer.echo(f"{finding.verdict.value:>4}  {finding.text}")
        found_off |= finding.verdict is Verdict.OFF
    if found_off:
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """All findings, as they are made."""
    yield _python()
    yield _sglang()
    yield from map(_package, PACKAGES)
    yield from _device()
    yield from map(_entry_point, GROUPS)
    yield from _environment()
    yield _backend()
    yield _cache()


def _python() -> Finding:
    supported = platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"))
    text = f"Python {platform.python_version()}"
    if supported:
        return Finding(Verdict.OK, text)
    return Finding(Verdict.OFF, f"{text}: install 3.11 or 3.12")


def _sglang() -> Finding:
    reasons = reasons_against_version("sglang", SGLANG_VERSION)
    if reasons:
        return Finding(Verdict.OFF, reasons[0])
    return Finding(Verdict.OK, f"sglang {SGLANG_VERSION}, the version this plugin is for")


def _package(name: str) -> Finding:
    try:
        return Finding(Verdict.OK, f"{name} {version(name)}")
    except PackageNotFoundError:
        return Finding(Verdict.OFF, f"{name} is missing: run `make install`")


def _device() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding(Verdict.OFF, f"torch does not load ({error}): run `make install`")
        return

    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        yield Finding(Verdict.OK, f"no GPU: serving on the CPU with {threads} threads")
        return
    from lim_sglang.validation import find_gpu, reasons_against_gpu

    gpu = find_gpu()
    assert gpu is not None, "torch found one"
    yield Finding(Verdict.OK, f"GPU {gpu.name}")
    if os.environ.get(CPU_ENGINE_VAR) == "1":
        text = f"{CPU_ENGINE_VAR}=1 keeps SGLang from using the GPU: unset it"
        yield Finding(Verdict.OFF, text)
        return
    yield from _decode_stack()
    reasons = reasons_against_gpu(gpu, None, os.environ)
    yield from (Finding(Verdict.OFF, reason) for reason in reasons)
    if not reasons:
        yield from _kernels(gpu.capability)


def _decode_stack() -> Iterator[Finding]:
    """Look at what decodes on a GPU beside our kernels."""
    with _quiet():
        reasons = reasons_against_decode_stack()
    yield from (Finding(Verdict.OFF, reason) for reason in reasons)
    if not reasons:
        text = f"FlashInfer {FLASHINFER_VERSION} and SGLang's part for it are as published"
        yield Finding(Verdict.OK, text)


def _kernels(capability: tuple[int, int]) -> Iterator[Finding]:
    """Compile every kernel on the GPU and compare it with the definition."""
    from lim_sglang.verify_gpu import served_batches, verify_gpu

    found = verify_gpu()
    yield from (Finding(Verdict.OFF, f"kernels: {difference}") for difference in found)
    if not found:
        names = ", ".join(served_batches(capability))
        yield Finding(Verdict.OK, f"kernels are exact for {names}")


def _entry_point(group: str) -> Finding:
    names = [point.name for point in entry_points(group=group)]
    if BACKEND in names:
        return Finding(Verdict.OK, f"entry point {BACKEND} in {group}")
    return Finding(Verdict.OFF, f"no entry point {BACKEND} in {group}: run `make install`")


def _environment() -> Iterator[Finding]:
    reasons = reasons_against_environment(os.environ)
    yield from (Finding(Verdict.OFF, reason) for reason in reasons)
    if not reasons:
        yield Finding(Verdict.OK, "SGLANG_PLUGINS and SGLANG_PLATFORM let the plugin load")
    settings = os.environ.get(ENV_VAR)
    if not settings:
        yield Finding(Verdict.OK, f"{ENV_VAR} is not set: flags and presets decide")
        return
    try:
        yield Finding(Verdict.OK, f"{ENV_VAR} gives {LimConfig.from_json(settings).to_json()}")
    except ConfigError as error:
        yield Finding(Verdict.OFF, f"{ENV_VAR}: {error}")


def _backend() -> Finding:
    """Load the plugin as SGLang does, and look for the backend among its choices."""
    from lim_sglang import compat

    try:
        with _quiet():
            registered = compat.loads_backend(BACKEND)
    except (ImportError, LimError) as error:
        return Finding(Verdict.OFF, f"the plugin does not load: {error}")
    if registered:
        return Finding(Verdict.OK, f"SGLang accepts --attention-backend {BACKEND}")
    return Finding(Verdict.OFF, f"SGLang does not know --attention-backend {BACKEND}: see its log")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep out what SGLang warns of while it is imported: none of it is for the user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _cache() -> Finding:
    from lim_sglang.models import SMOLLM2, cache_folder

    folder = cache_folder() / SMOLLM2.name
    if folder.is_dir():
        return Finding(Verdict.OK, f"{SMOLLM2.name} is in {folder}")
    return Finding(Verdict.NOTE, f"{SMOLLM2.name} is not yet in {folder}: 98 MB at first use")
