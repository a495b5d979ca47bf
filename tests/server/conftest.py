"""Fake servers' folders, and the model runner that GPU tests share: one process has one.

SGLang sets up torch's process group once a process. The shape comes from `LIM_TEST_SHAPE`, and
`make test-gpu` runs the tests once for each shape.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lim_sglang.compat import TENSOR_CORE_VAR
from lim_sglang.launch import server
from tests.fakes.sglang_process import NUM_PROCESSES
from tests.fakes.sglang_server import eventually
from tests.server.fake_servers import fake_options, process_ids, running
from tests.server.gpu_rig import SHAPES, Rig, build_model


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Make the runner."""
    shape = os.environ.get("LIM_TEST_SHAPE", next(iter(SHAPES)))
    folder = build_model(tmp_path_factory.mktemp(shape), shape)
    if not SHAPES[shape].tensor_cores:
        os.environ[TENSOR_CORE_VAR] = "false"
    return Rig(folder, SHAPES[shape].dtype, SHAPES[shape].kv_cache_dtype)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of temporary files, whose name is short enough for sockets; stays empty."""
    with tempfile.TemporaryDirectory(prefix="lim-test-", dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("LIM_CACHE", str(tmp_path / "cache"))
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


@pytest.fixture
def folder(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Fake servers' folder of process ids; neither processes nor files may outlive the test."""
    monkeypatch.setattr(server, "server_options", fake_options)
    monkeypatch.setattr(server, "GRACE_S", 0.2)
    monkeypatch.setattr(server, "POLL_S", 0.02)
    folder = tmp_path / "processes"
    folder.mkdir()
    yield folder
    eventually(lambda: not running(folder), 2)  # orphans are killed, and end a moment later
    left = running(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert len(process_ids(folder)) in (0, NUM_PROCESSES)
    pids = {str(pid) for pid in process_ids(folder)}
    shared = Path("/dev/shm").glob("lim-server-*")
    assert not [path for path in shared if path.name.rpartition("-")[2] in pids]
