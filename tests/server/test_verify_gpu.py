"""Exactness of the kernels on a GPU, and failures in words."""

from collections.abc import Callable
from subprocess import CalledProcessError

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from lim_sglang.kernels.verify import Batch
from lim_sglang.verify_gpu import (
    BATCHES,
    CHECKS,
    SCORED,
    SCORED_CHECKS,
    Check,
    served_batches,
    verify_gpu,
)

AMPERE, HOPPER = (8, 0), (9, 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for which kernels are compiled."""
    monkeypatch.setattr("lim_sglang.verify_gpu.interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: HOPPER)


def failing(error: Exception) -> dict[str, Check]:
    """Return checks of which one fails for the batch of Qwen3-8B."""

    def compare(batch: Batch) -> list[str]:
        if batch is BATCHES["Qwen3-8B"]:
            raise error
        return []

    return {"selection": compare}


@pytest.mark.gpu
def test_kernels_are_exact_on_all_batches() -> None:
    assert verify_gpu() == []


def test_every_fp8_cache_that_is_served_is_checked() -> None:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    checked = {batch.key_dtype for batch in served_batches(HOPPER).values()}
    assert {e4m3, e5m2} <= checked
    older = {batch.key_dtype for batch in served_batches(AMPERE).values()}
    assert older == checked - {e4m3}


def test_interpreted_kernels_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lim_sglang.verify_gpu.interpreted", lambda: True)
    (found,) = verify_gpu({})
    assert found.startswith("TRITON_INTERPRET is set")


@pytest.mark.parametrize("wrong", CHECKS)
@pytest.mark.usefixtures("hopper")
def test_a_difference_in_any_check_is_named_by_batch(wrong: str) -> None:
    def same(_batch: Batch) -> list[str]:
        return []

    def different(_batch: Batch) -> list[str]:
        return ["row 0: another ranking"]

    checks: dict[str, Callable[[Batch], list[str]]] = dict.fromkeys(CHECKS, same)
    names = SCORED if wrong in SCORED_CHECKS else BATCHES
    assert verify_gpu(checks | {wrong: different}) == [
        f"{name}: row 0: another ranking" for name in names
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "nvidia-smi"),
        (OutOfResources(262144, 232448, "shared memory"), "262144 of shared memory"),
        (CompilationError(None, None, "type fp8e4nv not supported"), "fp8e4nv not supported"),
        (CalledProcessError(1, ["gcc"]), "gcc"),
        (PermissionError("no cache"), "no cache"),
        (RuntimeError("CUDA error:\nan illegal memory access"), "illegal memory access"),
        (RuntimeError(), "no message"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.usefixtures("hopper")
def test_a_failure_names_the_batch_and_the_others_are_checked(error: Exception, words: str) -> None:
    (found,) = verify_gpu(failing(error))
    assert found.startswith("Qwen3-8B: ")
    assert words in found
    assert "\n" not in found


@pytest.mark.usefixtures("hopper")
def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="one device"):
        verify_gpu(failing(ValueError("tensors must be on one device")))
