"""Provenance of a number: the code, the package versions and the driver that made it."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import lim_sglang
from lim_sglang.config import COMMIT_VAR

CODE_FOLDERS = ("lim_sglang", "kernels", "programs", "evals")
SPEED_PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "transformers")


def project_commit() -> str | None:
    """Return the commit of this checkout, followed by a digest of local edits of the code.

    `LIM_COMMIT` wins. None if the variable is unset and the package is not in its own checkout.
    """
    if named := os.environ.get(COMMIT_VAR):
        return named
    root = Path(lim_sglang.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _run("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    edits = _run("git", "-C", str(root), "diff", "HEAD", "--", *CODE_FOLDERS)
    return f"{commit}+{hashlib.sha256(edits.encode()).hexdigest()[:10]}" if edits else commit


def installed_versions(packages: Sequence[str] = SPEED_PACKAGES) -> dict[str, str | None]:
    """Return the version of each package, None for a missing one."""
    return {"lim_sglang": lim_sglang.__version__} | {
        name: installed_version(name) for name in packages
    }


def installed_version(package: str) -> str | None:
    """Return the version of one package, None if the package is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Return the NVIDIA driver's version of the first GPU, None without `nvidia-smi`."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = _run(*query)
    return found.splitlines()[0].strip() if found else None


def _run(*command: str) -> str | None:
    """Return the output of a command, None where the command is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
