"""Work in a process of its own: memory of the GPU is whole again when it has ended."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ParamSpec, TypeVar

from lim_sglang.errors import LimError, ServerError

P = ParamSpec("P")
R = TypeVar("R")


def run_apart(what: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What a function of a module returns, called in a new process that ends with it.

    Args:
        what: the process, as it is called where it died.

    Raises:
        LimError: the function's own message, or that the process died.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(_in_words, function, args, kwargs)
        try:
            return future.result()
        except BrokenProcessPool:
            raise ServerError(f"{what} died: see what it has printed above") from None


def _in_words(function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    try:
        return function(*args, **kwargs)
    except LimError as error:
        # Errors with arguments of their own do not travel between processes.
        raise LimError(str(error)) from None
