"""What comes before every time: a GPU, and kernels that are exact on it."""

from collections.abc import Sequence

from lim_sglang.errors import LimError


def require_gpu() -> None:
    """Refuse to measure without a GPU, or with kernels that are interpreted."""
    import torch

    from lim_sglang.kernels.launch import interpreted

    if not torch.cuda.is_available():
        raise LimError("lim bench needs an NVIDIA GPU: on a CPU, timings prove nothing")
    if interpreted():
        raise LimError("TRITON_INTERPRET is set: unset it, interpreted kernels have no speed")


def check_exactness() -> None:
    """Refuse to measure on a GPU whose kernels differ from the definition.

    Raises:
        LimError: what differs, in words.
    """
    from lim_sglang.verify_gpu import verify_gpu

    refuse_differences(verify_gpu(), "on this GPU")


def refuse_differences(differences: Sequence[str], where: str) -> None:
    """Refuse to measure where something differs, with the list of it."""
    if differences:
        lines = "".join(f"\n  - {difference}" for difference in differences)
        raise LimError(f"no time is shown: kernels are not exact {where}:{lines}")
