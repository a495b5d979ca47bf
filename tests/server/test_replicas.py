"""Replicas of a server: their shares of the machine, their start and their ends, with fake SGLang
processes.
"""

import io
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from lim_sglang.config import server_name
from lim_sglang.errors import ConfigError, RefusedError, ServerError
from lim_sglang.launch import replicas as replicas_module
from lim_sglang.launch import server as server_module
from lim_sglang.launch.replicas import (
    replica_options,
    replicated,
    running_replicas,
    serve_on,
)
from lim_sglang.launch.serve import ready_block
from lim_sglang.launch.server import Server, ServerOptions, free_port
from lim_sglang.programs.proxy.balancer import Balancer
from lim_sglang.programs.proxy.command import begin_to_listen, listen
from tests.fakes.sglang_process import LAST_WORDS
from tests.fakes.sglang_server import eventually
from tests.server.fake_servers import fake_options, fake_spec, process_ids, running


@pytest.fixture
def folders(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder above those of fake servers' process ids; none of them outlives the test."""
    monkeypatch.setattr(server_module, "GRACE_S", 0.2)
    monkeypatch.setattr(replicas_module, "POLL_S", 0.02)
    yield tmp_path
    for folder in tmp_path.glob("processes-*"):
        assert eventually(lambda each=folder: not running(each), 2)  # type: ignore[misc]


def fakes(folders: Path, *manners: str) -> list[ServerOptions]:
    """Return the options of a fake server of each manner."""
    options = []
    for number, manner in enumerate(manners):
        folder = folders / f"processes-{number}"
        folder.mkdir()
        options.append(fake_options(fake_spec(folder, manner), port=free_port()))
    return options


def shown() -> tuple[Console, Callable[[], str]]:
    """Return a console, and a function that returns what it has shown."""
    text = io.StringIO()
    return Console(file=text, width=200), text.getvalue


def kill_main(server: Server, folder: Path) -> None:
    """Kill the main process of a fake server."""
    main = next(pid for pid in process_ids(folder) if "serve" in psutil.Process(pid).cmdline())
    os.kill(main, signal.SIGKILL)
    assert eventually(lambda: server.poll() is not None, 10)


def test_replicas_start_together_are_proved_and_end_together(folders: Path) -> None:
    console, text = shown()
    with running_replicas(fakes(folders, "serve", "serve"), console, title="tiny") as servers:
        assert list(servers) == ["replica 1", "replica 2"]
        infos = [httpx.get(f"{each.url}/server_info").json() for each in servers.values()]
        assert len({server_name(info) for info in infos}) == 2
        assert [each.live["config"] for each in servers.values()] == [{"policy": "full"}] * 2
        message = ready_block(ServerOptions("m", port=8), servers)
        assert re.search(r"url +http://127.0.0.1:8\n", message)
        assert all(f"{name} {each.url} (" in message for name, each in servers.items())
    assert "Starting 2 servers: tiny (usually 30 to 120 s on a CPU)\n" in text()
    for number in (1, 2):
        assert re.search(rf"SGLang's log of replica {number}: \S+\n", text())
        assert re.search(rf"Replica {number} is ready after \d+ s\n", text())


def test_a_replica_that_does_not_start_ends_all_with_words(folders: Path) -> None:
    console, _ = shown()
    with (
        pytest.raises(ServerError, match=f"(?s)^replica 2: .*code 1 before.*{LAST_WORDS}$"),
        running_replicas(fakes(folders, "serve", "fail"), console, title="tiny"),
    ):
        pytest.fail("a replica was missing")


def test_a_replica_that_ends_while_others_start_ends_all_with_words(folders: Path) -> None:
    console, _ = shown()
    with (
        pytest.raises(ServerError, match=rf"(?s)^replica 1: .*started \(log: .*{LAST_WORDS}$"),
        running_replicas(fakes(folders, "break", "hang"), console, title="tiny"),
    ):
        pytest.fail("a replica was missing")


def test_a_replica_that_ends_is_told_and_the_last_one_ends_all(
    folders: Path, temporary: Path
) -> None:
    console, text = shown()
    with running_replicas(fakes(folders, "serve", "serve"), console, title="tiny") as servers:
        balancer = Balancer([each.url for each in servers.values()])
        first, second = servers.values()
        kill_main(first, folders / "processes-0")

        def end_the_second(url: str) -> None:
            lose(url)
            if url == first.url:
                kill_main(second, folders / "processes-1")

        lose, balancer.lose = balancer.lose, end_the_second  # type: ignore[method-assign]
        with pytest.raises(ServerError, match=r"(?s)all replicas are gone:.* 1 .* 2 is gone"):
            serve_on(servers, balancer, console)
        assert all(each.is_lost for each in balancer.replicas)
        assert servers == {}
        assert list(temporary.iterdir()) == []  # its files go with a replica, not at the end
    assert re.search(
        r"replica 1 is gone: SGLang's main process .* signal 9 \(SIGKILL\) \(log: ", text()
    )
    assert "replica 2 serves on.\n" in text()


def test_the_address_is_taken_before_anything_starts(folders: Path) -> None:
    options = ServerOptions("m", port=free_port())
    with (
        pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"),
        replicated(
            ServerOptions("m", host="192.0.2.1", port=options.port), 2, shown()[0], title="tiny"
        ),
    ):
        pytest.fail("it listens elsewhere")


def test_one_of_two_that_bound_a_port_answers_there() -> None:
    with closing(listen("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with closing(listen("127.0.0.1", port)) as second:
            begin_to_listen(first)
            with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
                begin_to_listen(second)


def test_each_replica_on_a_cpu_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 8})
    found = replica_options(ServerOptions("m", host="0.0.0.0", port=8, api_key="k"), 2)
    assert [each.cores for each in found] == [(4, 5), (6, 7)]
    assert {each.host for each in found} == {"127.0.0.1"}
    assert {each.api_key for each in found} == {"k"}
    assert len({each.port for each in found} | {8}) == 3
    assert [each.cores for each in replica_options(ServerOptions("m"), 6)][-1] == (4,)


@pytest.mark.parametrize(
    ("gpus", "number", "parts"),
    [("0 1", 2, ["0", "1"]), ("0 1 2 3 4", 2, ["0,1", "2,3"]), ("GPU-a GPU-b", 1, ["GPU-a,GPU-b"])],
)
def test_each_replica_on_gpus_has_an_equal_share(
    monkeypatch: pytest.MonkeyPatch, gpus: str, number: int, parts: list[str]
) -> None:
    monkeypatch.setattr(replicas_module, "visible_gpus", gpus.split)
    found = replica_options(ServerOptions("m", on_cpu=False), number)
    assert [each.environment()["CUDA_VISIBLE_DEVICES"] for each in found] == parts
    assert not any(each.cores for each in found)


def test_replicas_that_have_no_gpu_are_refused_with_all_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas_module, "visible_gpus", lambda: ["0"])
    options = ServerOptions("m", on_cpu=False, sglang_options=("--base-gpu-id", "1"))
    with pytest.raises(RefusedError) as refused:
        replica_options(options, 2)
    assert [reason.split()[0] for reason in refused.value.reasons] == [
        "--replicas",
        "--base-gpu-id",
    ]
