"""`lim doctor`: what is installed, and every obstacle to serving with LessIsMore."""

import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import entry_points

import typer

from lim_sglang import compat
from lim_sglang.compat import (
    CPU_ENGINE_VAR,
    FLASHINFER_VERSION,
    PLATFORM_VAR,
    PLUGINS_VAR,
    SGLANG_VERSION,
    reasons_against_decode_stack,
    reasons_against_version,
    serves_on_cpu,
)
from lim_sglang.config import CONFIG_VAR, LimConfig
from lim_sglang.environment import installed_version
from lim_sglang.errors import ConfigError, LimError
from lim_sglang.models import SMOLLM2, cache_folder
from lim_sglang.validation import (
    BACKEND,
    find_gpu,
    reasons_against_environment,
    reasons_against_gpu,
)

GROUPS = ("sglang.srt.plugins", "sglang.srt.platforms")
"""Entry point groups that SGLang reads."""
PACKAGES = ("torch", "triton", "flashinfer-python", "transformers", "openai", "datasets")


class Verdict(Enum):
    """The mark of a finding."""

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
    """Yield all findings as they are made."""
    yield _python()
    sglang = f"sglang {SGLANG_VERSION}, the version this plugin is for"
    yield from _findings(reasons_against_version("sglang", SGLANG_VERSION), sglang)
    yield from map(_package, PACKAGES)
    yield from _device()
    yield from map(_entry_point, GROUPS)
    yield from _environment()
    yield _backend()
    yield _cache()


def _findings(reasons: list[str], fine: str) -> Iterator[Finding]:
    """Yield each reason as off; `fine` if there is none."""
    yield from (Finding(Verdict.OFF, reason) for reason in reasons)
    if not reasons:
        yield Finding(Verdict.OK, fine)


def _python() -> Finding:
    supported = platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"))
    text = f"Python {platform.python_version()}"
    if supported:
        return Finding(Verdict.OK, text)
    return Finding(Verdict.OFF, f"{text}: install 3.11 or 3.12")


def _package(name: str) -> Finding:
    found = installed_version(name)
    if found:
        return Finding(Verdict.OK, f"{name} {found}")
    return Finding(Verdict.OFF, f"{name} is missing: run `make install`")


def _device() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding(Verdict.OFF, f"torch does not load ({error}): run `make install`")
        return

    gpu = find_gpu()
    if gpu is None:
        threads = torch.get_num_threads()
        yield Finding(Verdict.OK, f"no GPU: serving on the CPU with {threads} threads")
        return
    yield Finding(Verdict.OK, f"GPU {gpu.name}")
    if serves_on_cpu():
        text = f"{CPU_ENGINE_VAR}=1 keeps SGLang from using the GPU: unset it"
        yield Finding(Verdict.OFF, text)
        return
    yield from _decode_stack()
    reasons = reasons_against_gpu(gpu, None, os.environ)
    yield from (Finding(Verdict.OFF, reason) for reason in reasons)
    if not reasons:
        yield from _kernels(gpu.capability)


def _decode_stack() -> Iterator[Finding]:
    """Check the packages that decode on a GPU beside our kernels."""
    with _quiet():
        reasons = reasons_against_decode_stack()
    fine = f"FlashInfer {FLASHINFER_VERSION} and SGLang's part for it are as published"
    yield from _findings(reasons, fine)


def _kernels(capability: tuple[int, int]) -> Iterator[Finding]:
    """Compile every kernel on the GPU and compare its results with the definition."""
    from lim_sglang.verify_gpu import served_batches, verify_gpu

    reasons = [f"kernels: {difference}" for difference in verify_gpu()]
    yield from _findings(reasons, f"kernels are exact for {', '.join(served_batches(capability))}")


def _entry_point(group: str) -> Finding:
    names = [point.name for point in entry_points(group=group)]
    if BACKEND in names:
        return Finding(Verdict.OK, f"entry point {BACKEND} in {group}")
    return Finding(Verdict.OFF, f"no entry point {BACKEND} in {group}: run `make install`")


def _environment() -> Iterator[Finding]:
    fine = f"{PLUGINS_VAR} and {PLATFORM_VAR} let the plugin load"
    yield from _findings(reasons_against_environment(os.environ), fine)
    settings = os.environ.get(CONFIG_VAR)
    if not settings:
        yield Finding(Verdict.OK, f"{CONFIG_VAR} is not set: flags and presets decide")
        return
    try:
        yield Finding(Verdict.OK, f"{CONFIG_VAR} gives {LimConfig.from_json(settings).to_json()}")
    except ConfigError as error:
        yield Finding(Verdict.OFF, f"{CONFIG_VAR}: {error}")


def _backend() -> Finding:
    """Load the plugin as SGLang does, and look for the backend among SGLang's choices."""
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
    """Silence warnings of SGLang's import: none of them is for the user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _cache() -> Finding:
    folder = cache_folder() / SMOLLM2.name
    if folder.is_dir():
        return Finding(Verdict.OK, f"{SMOLLM2.name} is in {folder}")
    return Finding(Verdict.NOTE, f"{SMOLLM2.name} is not yet in {folder}: 98 MB at first use")
