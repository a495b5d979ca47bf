"""SGLang's platform entry point for hosts without CUDA.

SGLang's kernel wheel cannot be imported there, although a CPU server calls none of its functions.
`activate` puts an empty module in its place and leaves the choice of platform to SGLang.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lim_sglang.compat import serves_on_cpu

KERNELS = "sgl_kernel"


def activate() -> None:
    """Called by SGLang in each of its processes, before anything imports its kernels.

    Returns None, which tells SGLang that this is not a platform of its own.
    """
    if serves_on_cpu() and not _can_import(KERNELS):
        sys.modules[KERNELS] = _stand_in(KERNELS)


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        # A failed import can leave submodules behind.
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]
        return False
    return True


def _stand_in(name: str) -> ModuleType:
    """A module whose functions can be imported by name, and say what is missing when called."""
    module = ModuleType(name, "Stands in for SGLang's GPU kernels on a host without CUDA.")
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None)

    def get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(
                f"{name}.{attribute} needs a GPU: this option cannot be served on a CPU"
            )

        return missing

    module.__dict__["__getattr__"] = get
    return module
