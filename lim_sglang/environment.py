"""Which code, versions and device made a number."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import lim_sglang

CODE_FOLDERS = ("lim_sglang", "kernels", "programs", "evals")
COMMIT_VAR = "LIM_COMMIT"
"""Names the commit of a copy whose git checkout, if it has one, is not the code's."""
SPEED_PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "transformers")


def project_commit() -> str | None:
    """The commit of this checkout; with local edits of the code, a digest of them behind it.

    `LIM_COMMIT` wins. None when it is not set and the package is not run from its own checkout.
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
    """The version of each package, None for one that is missing."""
    return {"lim_sglang": lim_sglang.__version__} | {name: _version(name) for name in packages}


def driver_version() -> str | None:
    """The NVIDIA driver of the first GPU, None where `nvidia-smi` is missing."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = _run(*query)
    return found.splitlines()[0].strip() if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
