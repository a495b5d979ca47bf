"""`lim doctor`: what is installed, and every obstacle to serving with LessIsMore."""

import logging
import os
import platform
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, requires

import typer
from rich.console import Console

from lim_sglang import __version__, compat
from lim_sglang.compat import (
    CPU_ENGINE_VAR,
    PLATFORM_VAR,
    PLUGIN_GROUP,
    PLUGINS_VAR,
    flashinfer_version,
    reasons_against_decode_stack,
    serves_on_cpu,
)
from lim_sglang.config import ALLOW_VAR, BACKEND, CONFIG_VAR, LimConfig
from lim_sglang.environment import installed_version
from lim_sglang.errors import ConfigError, LimError
from lim_sglang.models import SMOLLM2, cache_folder, has_gpu, keep_caches
from lim_sglang.progress import print_plain, waiting
from lim_sglang.validation import find_gpu, reasons_against_environment, reasons_against_gpu

GROUPS = (PLUGIN_GROUP, "sglang.srt.platforms")
"""Entry point groups that SGLang reads."""
DISTRIBUTION = "lim-sglang"
EXACT: tuple[str, ...] = ("sglang",)
EXACT_ON_GPU = ("sglang", "flashinfer-python")
"""Packages of which no other version can be served with."""
USED_BY: Mapping[str, str] = {
    "math-verify": "lim ask, proxy, eval and grade",
    "latex2sympy2-extended": "lim ask, proxy, eval and grade",
    "datasets": "the benchmarks of lim eval",
    "scipy": "lim eval, compare and report",
    "matplotlib": "lim report and the plots of lim bench",
    "jinja2": "the page of lim report",
    "openai": "lim proxy, and lim ask and eval with --api openai",
    "gguf": f"{SMOLLM2.name}, the model that comes from PyPI",
    "accelerate": f"{SMOLLM2.name}, the model that comes from PyPI",
}
"""Packages that serving does without, and what needs them."""


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
    console = Console(highlight=False)
    keep_caches()
    found_off = False
    for finding in examine(partial(waiting, Console(stderr=True))):
        line = f"{finding.verdict.value:>4}  {finding.text}"
        print_plain(console, line, whole=finding.verdict is not Verdict.OK)
        found_off |= finding.verdict is Verdict.OFF
    if found_off:
        raise typer.Exit(1)


def examine(
    show_wait: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Iterator[Finding]:
    """Yield all findings as they are made, the quick ones first.

    Args:
        show_wait: makes the block of each wait of seconds from what it waits for.
    """
    yield _python()
    yield from _packages()
    yield from map(_entry_point, GROUPS)
    yield from _environment()
    yield _cache()
    with show_wait("loading torch and checking the device"):
        found = [*_device()]
    yield from found
    with show_wait("loading SGLang's server and the plugin"):
        backend = _backend()
    yield backend


def _findings(reasons: list[str], fine: str) -> Iterator[Finding]:
    """Yield each reason as off; `fine` if there is none."""
    yield from (Finding(Verdict.OFF, reason) for reason in reasons)
    if not reasons:
        yield Finding(Verdict.OK, fine)


def _python() -> Finding:
    supported = platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"))
    text = f"{DISTRIBUTION} {__version__}, Python {platform.python_version()}"
    if supported:
        return Finding(Verdict.OK, text)
    return Finding(Verdict.OFF, f"{text}: install Python 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    """Compare the installed packages with the versions that this one was tested with."""
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        yield Finding(Verdict.OFF, f"{DISTRIBUTION} is not installed: run `make install`")
        return
    exact = EXACT_ON_GPU if has_gpu() else EXACT
    if tried := compat.tried_version():
        yield Finding(Verdict.NOTE, f"{ALLOW_VAR}={tried} lets this SGLang serve, unverified")
        exact = ()
    yield from compare_packages(requirements, exact)


def compare_packages(requirements: Iterable[str], exact: Collection[str]) -> Iterator[Finding]:
    """Yield a finding for each required package that is missing or of another version.

    Args:
        requirements: as the metadata of a distribution have them, such as `a[b]==1.0`; those of
            extras are left out.
        exact: packages of which no other version can be served with.
    """
    pinned = [requirement for requirement in requirements if "extra ==" not in requirement]
    agreeing = []
    for requirement in pinned:
        package, _, version = requirement.partition("==")
        name = package.partition("[")[0]
        found = installed_version(name)
        install = f"pip install '{requirement}'"
        if found == version:
            agreeing.append(f"{name} {found}")
        elif found and name in exact:
            yield Finding(Verdict.OFF, f"{name} {found}: exactly {version} is needed, {install}")
        elif found:
            harmless = "" if compat.tried_version() else "harmless, "
            yield Finding(Verdict.NOTE, f"{name} {found}: {harmless}tested was {version}")
        elif name in USED_BY:
            text = f"{name} is missing: needed by {USED_BY[name]}, not to serve; {install}"
            yield Finding(Verdict.NOTE, text)
        else:
            yield Finding(Verdict.OFF, f"{name} is missing: needed to serve, {install}")
    if agreeing:
        yield Finding(Verdict.OK, f"as tested: {', '.join(agreeing)}")


def _device() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding(Verdict.OFF, f"torch does not load ({error}): install it again")
        return

    gpu = find_gpu()
    if gpu is None:
        threads = torch.get_num_threads()
        yield Finding(Verdict.OK, f"no GPU: serving on the CPU with {threads} threads")
        return
    yield from _gpus([torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())])
    if serves_on_cpu():
        text = f"{CPU_ENGINE_VAR}=1 keeps SGLang from using the GPU: unset it"
        yield Finding(Verdict.OFF, text)
        return
    yield from _decode_stack()
    reasons = reasons_against_gpu(gpu, None, os.environ)
    yield from (Finding(Verdict.OFF, reason) for reason in reasons)
    if not reasons:
        yield from _kernels(gpu.capability)


def _gpus(names: Sequence[str]) -> Iterator[Finding]:
    """Name the GPUs, and how several of them serve."""
    yield Finding(Verdict.OK, f"GPU {names[0]}")
    if len(names) == 1:
        return
    serves = f"lim serve MODEL --replicas {len(names)} serves a copy of the model on each"
    yield Finding(Verdict.OK, f"{len(names)} GPUs: {serves}; no model is shared out among several")
    if others := {*names} - {names[0]}:
        text = f"GPUs of other kinds, {', '.join(sorted(others))}: only {names[0]} is checked here"
        yield Finding(Verdict.NOTE, text)


def _decode_stack() -> Iterator[Finding]:
    """Check the packages that decode on a GPU beside our kernels."""
    with _quiet():
        reasons = reasons_against_decode_stack()
    fine = f"FlashInfer {flashinfer_version()} and SGLang's part for it are as published"
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
    text = f"no entry point {BACKEND} in {group}: run `make install`, or `pip install --no-deps .`"
    return Finding(Verdict.OFF, text)


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
