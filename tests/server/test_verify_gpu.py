"""What is checked before any time is shown, and how it fails in words."""

from collections.abc import Callable
from subprocess import CalledProcessError

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from lim_sglang import verify_gpu as module
from lim_sglang.kernels.verify import Batch
from lim_sglang.verify_gpu import BATCHES, served_batches, verify_gpu

AMPERE, HOPPER = (8, 0), (9, 0)


def fail_with(error: Exception) -> Callable[[Batch, str], list[str]]:
    """Stand in for the comparison: the batch of Qwen3-8B fails."""

    def differences(batch: Batch, _device: str) -> list[str]:
        if batch is BATCHES["Qwen3-8B"]:
            raise error
        return []

    return differences


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU that compiles."""
    monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(module, "mass_differences", lambda _batch, _device: [])
    monkeypatch.setattr(module, "attention_differences", lambda _batch, _device: [])
    monkeypatch.setattr(module, "stored_score_differences", lambda _batch: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: HOPPER)
    return monkeypatch


def test_every_fp8_cache_that_is_served_is_checked() -> None:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    checked = {batch.key_dtype for batch in served_batches(HOPPER).values()}
    assert {e4m3, e5m2} <= checked
    older = {batch.key_dtype for batch in served_batches(AMPERE).values()}
    assert older == checked - {e4m3}


def test_interpreted_kernels_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "interpreted", lambda: True)
    monkeypatch.setattr(module, "selection_differences", lambda _batch, _device: [])
    (found,) = verify_gpu()
    assert found.startswith("TRITON_INTERPRET is set")


def test_selection_by_mass_is_checked_too(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(module, "selection_differences", lambda _batch, _device: [])
    hopper.setattr(module, "mass_differences", lambda _batch, _device: ["row 0: other masses"])
    assert "Qwen3-8B: row 0: other masses" in verify_gpu()


def test_attention_over_slots_is_checked_too(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(module, "selection_differences", lambda _batch, _device: [])
    hopper.setattr(module, "attention_differences", lambda _batch, _device: ["row 0: off"])
    assert verify_gpu() == [f"{name}: row 0: off" for name in BATCHES]


def test_the_scoring_dense_pass_is_checked_too(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(module, "selection_differences", lambda _batch, _device: [])
    hopper.setattr(module, "stored_score_differences", lambda _batch: ["row 0: other normalisers"])
    assert verify_gpu() == [f"{name}: row 0: other normalisers" for name in module.SCORED]


def test_differences_are_named_by_batch(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(
        module, "selection_differences", lambda _batch, _device: ["row 0: another ranking"]
    )
    assert verify_gpu() == [f"{name}: row 0: another ranking" for name in BATCHES]


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
def test_a_failure_names_the_batch_and_the_others_are_checked(
    hopper: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    hopper.setattr(module, "selection_differences", fail_with(error))
    (found,) = verify_gpu()
    assert found.startswith("Qwen3-8B: ")
    assert words in found
    assert "\n" not in found


def test_our_own_mistakes_keep_their_traceback(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(
        module, "selection_differences", fail_with(ValueError("tensors must be on one device"))
    )
    with pytest.raises(ValueError, match="one device"):
        verify_gpu()
