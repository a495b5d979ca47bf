"""The server's command line, its proof of life and its end, with a stand-in for SGLang."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import psutil
import pytest

from lim_sglang import server as server_module
from lim_sglang.errors import ServerError
from lim_sglang.server import Server, ServerOptions, StartError, free_port, reasons_against_start

STUBBORN_TREE = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""

LEAVES_A_CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
sys.exit(3)
"""


def running(monkeypatch: pytest.MonkeyPatch, program: str, **options: Any) -> Server:
    """A started server whose SGLang is a program of ours."""
    monkeypatch.setattr(
        ServerOptions, "command_line", lambda _self: [sys.executable, "-c", program]
    )
    server = Server(ServerOptions("model", **options), log=subprocess.DEVNULL)
    server.start()
    return server


def reasons(*options: str, port: int | None = None, **environment: str) -> list[str]:
    """Why a start with these SGLang options and variables is refused."""
    return reasons_against_start("127.0.0.1", port or free_port(), options, environment)


def test_the_users_options_come_last_so_that_they_win() -> None:
    command = ServerOptions(
        "model", lim_flags=("--lim-budget=9",), sglang_options=("--dtype", "bfloat16")
    ).command_line()
    assert command[-3:] == ["--lim-budget=9", "--dtype", "bfloat16"]
    assert command.index("float32") < command.index("bfloat16")


def test_a_cpu_server_is_told_so_by_option_and_environment() -> None:
    on_cpu, on_gpu = ServerOptions("model"), ServerOptions("model", on_cpu=False)
    assert "--device" in on_cpu.command_line()
    assert on_cpu.environment()["SGLANG_USE_CPU_ENGINE"] == "1"
    assert "--device" not in on_gpu.command_line()


def test_a_dense_server_decodes_by_the_backend_that_is_named() -> None:
    command = ServerOptions("model", backend="flashinfer").command_line()
    assert command[command.index("--attention-backend") + 1] == "flashinfer"


def test_the_key_is_handed_on() -> None:
    command = ServerOptions("model", api_key="secret").command_line()
    assert command[command.index("--api-key") + 1] == "secret"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:5"),
        ("0.0.0.0", "http://127.0.0.1:5"),
        ("::", "http://[::1]:5"),
    ],
)
def test_a_client_on_this_machine_has_an_address(host: str, url: str) -> None:
    assert ServerOptions("model", host=host, port=5).url == url


def test_a_plain_start_is_not_refused() -> None:
    assert reasons("--tp-size", "2", SGLANG_PLUGINS="other, lim") == []


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ((), {"SGLANG_PLUGINS": "none"}, "SGLANG_PLUGINS=none"),
        ((), {"SGLANG_PLATFORM": "lim"}, "SGLANG_PLATFORM=lim"),
        (("--attention-backend", "triton"), {}, "served by triton"),
        (("--decode-attention-backend=fa3",), {}, "served by fa3"),
    ],
)
def test_a_start_without_the_plugin_is_refused(
    options: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    (reason,) = reasons(*options, **environment)
    assert words in reason


def test_another_prefill_backend_is_fine() -> None:
    assert reasons("--prefill-attention-backend", "fa3") == []


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (reason,) = reasons(port=taken.getsockname()[1])
    assert "in use" in reason


def test_all_reasons_come_at_once() -> None:
    assert len(reasons("--attention-backend", "fa3", SGLANG_PLUGINS="x", SGLANG_PLATFORM="y")) == 3


def test_a_stubborn_tree_is_gone_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 1.0)
    server = running(monkeypatch, STUBBORN_TREE)
    assert server._process
    tree = psutil.Process(server._process.pid)
    while not tree.children():
        time.sleep(0.05)
    processes = [tree, *tree.children()]
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 10
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_that_comes_while_it_ends_is_heeded_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 1.0)
    server = running(monkeypatch, STUBBORN_TREE)
    assert server._process
    main = server._process
    while not psutil.Process(main.pid).children():
        time.sleep(0.05)
    heard: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(main.poll() is not None))
    try:
        soon = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        soon.start()
        server.stop()
        soon.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [True]  # once, and when nothing ran any more


def test_what_a_dead_server_left_behind_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server = running(monkeypatch, LEAVES_A_CHILD)
    assert server._process
    group = server._process.pid
    server._process.wait()
    assert alive_in_group(group)
    server.stop()
    time.sleep(0.2)
    assert not alive_in_group(group)


def alive_in_group(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.mark.parametrize("code", [1, 2])
def test_an_early_death_is_told_with_its_code(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    server = running(monkeypatch, f"raise SystemExit({code})", port=free_port())
    with pytest.raises(StartError, match=f"code {code}") as caught:
        server.wait_until_ready()
    assert caught.value.code == code


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server = running(monkeypatch, "import time; time.sleep(60)", port=free_port())
    with pytest.raises(ServerError, match="not ready after"):
        server.wait_until_ready(timeout_s=0.2)
    server.stop()


class Info(BaseHTTPRequestHandler):
    """Answers as SGLang does; `state` is what it shows of its scheduler."""

    state: dict[str, Any]
    top: dict[str, str]
    """What else it shows."""
    keys: list[str | None]

    def do_GET(self) -> None:
        """Both addresses that a start asks."""
        self.keys.append(self.headers["Authorization"])
        body = json.dumps(self.top | {"internal_states": [self.state]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def info() -> Iterator[tuple[type[Info], int]]:
    """A listening stand-in, and its port."""
    handler = type("OneInfo", (Info,), {"state": {}, "top": {}, "keys": []})
    listener = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield handler, listener.server_port
    listener.shutdown()
    listener.server_close()


def test_a_live_server_shows_its_state(info: tuple[type[Info], int]) -> None:
    handler, port = info
    handler.state = {"lim": {"roles": ["full"]}}
    server = Server(ServerOptions("model", port=port, api_key="secret"))
    assert server.wait_until_ready() == {"roles": ["full"]}
    assert set(handler.keys) == {"Bearer secret"}


def test_a_dense_server_is_an_error(info: tuple[type[Info], int]) -> None:
    _, port = info
    with pytest.raises(ServerError, match=r"without LessIsMore.*lim doctor"):
        Server(ServerOptions("model", port=port)).wait_until_ready()


def test_a_dense_server_that_was_asked_for_is_proved_to_be_one(
    info: tuple[type[Info], int],
) -> None:
    handler, port = info
    handler.top = {"attention_backend": "flashinfer"}
    server = Server(ServerOptions("model", port=port, backend="flashinfer"))
    assert server.wait_until_ready() == {}


@pytest.mark.parametrize(
    ("top", "state", "words"),
    [
        ({"attention_backend": "triton"}, {}, "decodes by triton, asked for was flashinfer"),
        (
            {"attention_backend": "flashinfer", "decode_attention_backend": "fa3"},
            {},
            "decodes by fa3",
        ),
        ({"attention_backend": "flashinfer"}, {"lim": {"roles": []}}, "decodes by lim"),
    ],
)
def test_another_backend_than_the_dense_one_that_was_asked_for_is_an_error(
    info: tuple[type[Info], int], top: dict[str, str], state: dict[str, Any], words: str
) -> None:
    handler, port = info
    handler.top, handler.state = top, state
    with pytest.raises(ServerError, match=words):
        Server(ServerOptions("model", port=port, backend="flashinfer")).wait_until_ready()


def test_a_dense_server_is_ended(
    monkeypatch: pytest.MonkeyPatch, info: tuple[type[Info], int]
) -> None:
    _, port = info
    monkeypatch.setattr(
        ServerOptions,
        "command_line",
        lambda _self: [sys.executable, "-c", "import time; time.sleep(60)"],
    )
    server = Server(ServerOptions("model", port=port))
    with pytest.raises(ServerError), server:
        pass
    assert server.poll() is not None
