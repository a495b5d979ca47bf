"""The model runner that GPU tests share; one process has one, of one shape.

SGLang sets up torch's process group once a process. The shape comes from `LIM_TEST_SHAPE`, and
`make test-gpu` runs the tests once for each shape.
"""

import os

import pytest

from lim_sglang.compat import TENSOR_CORE_VAR
from tests.server.gpu_rig import SHAPES, Rig, build_model


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Make the runner."""
    shape = os.environ.get("LIM_TEST_SHAPE", next(iter(SHAPES)))
    folder = build_model(tmp_path_factory.mktemp(shape), shape)
    if not SHAPES[shape].tensor_cores:
        os.environ[TENSOR_CORE_VAR] = "false"
    return Rig(folder, SHAPES[shape].dtype, SHAPES[shape].kv_cache_dtype)
