"""Work in a process of its own: what comes back, also where it fails or dies."""

import os

import pytest

from lim_sglang.bench.apart import run_apart
from lim_sglang.bench.shapes import check_shape
from lim_sglang.errors import LimError, ServerError


def test_the_result_comes_from_another_process() -> None:
    assert run_apart("a process", os.getpid) != os.getpid()


def test_a_failure_keeps_its_words() -> None:
    with pytest.raises(LimError, match="unknown shape 'qwen9'"):
        run_apart("a process", check_shape, "qwen9")


def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(ServerError, match="the check of this GPU died"):
        run_apart("the check of this GPU", os._exit, 3)
