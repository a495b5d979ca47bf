"""LessIsMore sparse attention for reasoning models, as a plugin of SGLang.

From Python: `ask` a running server, `grade` a reply, `extract_answer` of a reply; `Vote` is what
`ask` returns, `LimError` what all of them raise. Nothing heavy is imported before the first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lim_sglang.api import Vote, ask, extract_answer, grade
    from lim_sglang.errors import LimError

__version__ = "0.1.0"
__all__ = ["LimError", "Vote", "ask", "extract_answer", "grade"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "errors" if name == "LimError" else "api"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
