"""The models that the GPU tests share; each runner is made once, in one process of its own shape.

SGLang sets up torch's process group once a process, so one process has one runner: the shape comes
from `LIM_TEST_SHAPE`, and `make test-gpu` runs the folder once for each.
"""

import os

import pytest

from lim_sglang.compat import TENSOR_CORE_VAR
from tests.server.gpu_rig import SHAPES, Rig, build_model


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """The runner."""
    shape = os.environ.get("LIM_TEST_SHAPE", next(iter(SHAPES)))
    folder = build_model(tmp_path_factory.mktemp(shape), shape)
    if not SHAPES[shape].tensor_cores:
        os.environ[TENSOR_CORE_VAR] = "false"
    return Rig(folder, SHAPES[shape].dtype, SHAPES[shape].kv_cache_dtype)
