"""What comes before every time: a GPU, and kernels that are exact on it."""

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
    from lim_sglang.gate import check_gpu

    failures = check_gpu()
    if failures:
        lines = "".join(f"\n  - {failure}" for failure in failures)
        raise LimError(f"no time is shown: kernels are not exact on this GPU:{lines}")
