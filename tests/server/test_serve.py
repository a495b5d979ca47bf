"""`lim serve` before and after the server: its refusals, its message, and a real refused start."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang import cli
from lim_sglang.errors import ConfigError
from lim_sglang.launch import serve as serve_module
from lim_sglang.launch.serve import claimed, commands_block, ready_block
from lim_sglang.launch.server import ServerOptions, free_port
from lim_sglang.programs.options import list_programs
from tests.builders import Screen
from tests.processes import LIM_SERVE, clean_environment, end_tree

FAILED, REFUSED = 1, 2
"""Exit codes: a start that failed, and one that was refused, by whichever process."""
TIMEOUT_S = 120
ROLES = ["full", "full", "select", "reuse", "select", "reuse"]


def live(roles: list[str], policy: str = "lessismore") -> dict[str, Any]:
    """Return LessIsMore's part of a server's `/server_info`."""
    return {"config": {"policy": policy, "budget": 256}, "roles": roles}


def alone(state: dict[str, Any], log: Path | None = None) -> Any:
    """Return a ready server as `ready_block` takes it."""
    return {"": SimpleNamespace(live=state, log=log)}


def test_the_message_says_where_what_and_how_but_never_the_key() -> None:
    log = Path("/tmp/lim-server-x/server.log")
    sparse = ready_block(ServerOptions("some/model", port=31000), alone(live(ROLES), log))
    assert "http://127.0.0.1:31000" in sparse
    assert "some/model" in sparse
    assert "2 of 6 layers read 256 tokens picked at layers 2, 4" in sparse
    assert str(log) in sparse
    dense = ready_block(ServerOptions("some/model"), alone(live(["full"] * 6, "full")))
    assert "full: all 6 layers read everything" in dense
    assert "256" not in dense
    assert "log " not in dense
    assert "layers    " not in sparse
    drafting = live(["full"] * 6, "lossless") | {"draft_tokens": 8}
    drafting["config"]["select_layers"] = [2, 4]
    lossless = ready_block(ServerOptions("some/model"), alone(drafting))
    assert "up to 8 drafts a step, from 256 tokens picked at layers 2, 4; all 6 layers" in lossless
    other = {
        "measured_on": "Qwen3-8B",
        "differences": ["rope theta 1", "other weights"],
    }
    shown = ready_block(ServerOptions("some/model"), alone(live(ROLES) | {"preset": other}))
    assert "  layers    those of Qwen3-8B, but rope theta 1, other weights: compare" in shown
    unknown = {"measured_on": None, "differences": ["no model of its shape was measured"]}
    shown = ready_block(ServerOptions("some/model"), alone(live(ROLES) | {"preset": unknown}))
    assert "  layers    no model of its shape was measured: compare with --policy full" in shown
    open_to_all = commands_block(ServerOptions("some/model"))
    assert 'lim ask "What is 17 * 23?"' in open_to_all
    assert "Bearer" not in open_to_all
    with_key = commands_block(ServerOptions("some/model", api_key="secret"))
    assert "Bearer $LIM_API_KEY" in with_key
    assert "secret" not in with_key
    assert all(
        f"stop      Ctrl-C, or kill {os.getpid()}\n" in text for text in (open_to_all, with_key)
    )


def interrupt(*_: object) -> None:
    """Raise what a signal to stop raises."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("is_live", "code", "said"),
    [
        (False, 130, "The start of the server has been interrupted."),
        (True, 0, "Stopping the server.\nThe server has been stopped."),
    ],
)
def test_a_signal_to_stop_is_the_end_of_a_live_server_but_a_failure_before(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_live: bool,
    code: int,
    said: str,
) -> None:
    @contextmanager
    def running_server(*_: object, **__: object) -> Iterator[SimpleNamespace]:
        if not is_live:
            interrupt()
        yield SimpleNamespace(live=live(ROLES), log=None, wait=interrupt)

    monkeypatch.setattr(serve_module, "running_server", running_server)
    monkeypatch.setattr(serve_module, "server_options", lambda *_, **__: ServerOptions("a/model"))
    monkeypatch.setattr(sys, "argv", ["lim", "serve", "a/model"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert ("LessIsMore is live" in shown.out) == is_live


def test_on_a_terminal_sentences_are_wrapped_and_commands_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def running_server(*_: object, **__: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(live=live(ROLES), log=Path("/tmp/log"), wait=interrupt)

    options = ServerOptions("a/model")
    monkeypatch.setattr(serve_module, "running_server", running_server)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    serve_module._run(options, "a title", verbose=False)
    list_programs()
    stopped = "Stopping the server.\nThe server has been stopped.\n"
    message, listed = screen.getvalue().split(stopped)
    assert f"picked\n{' ' * 12}at layers 2, 4\n" in message
    commands = commands_block(options)
    assert max(map(len, commands.splitlines())) > 60
    assert commands in message
    lines = [*message.replace(commands, "").splitlines(), *listed.splitlines()]
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("some/model", "--port", "{taken}"), REFUSED, "port {taken} of 127.0.0.1 is in use"),
        (("some/model", "--budget", "many"), REFUSED, "--lim-budget: must be an integer"),
        (("some/model", "--", "--port", "8"), REFUSED, "--port after --"),
        (("no-such-model",), REFUSED, "'no-such-model' is neither a folder nor a hub id"),
    ],
)
def test_a_start_that_cannot_be_is_one_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    named: str,
) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        given = [word.format(taken=taken) for word in words]
        command = ["lim", "serve", "--port", str(free_port()), *given]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == code
    assert error.startswith("error: ")
    assert named.format(taken=taken) in error


@pytest.mark.parametrize("replicas", [(), ("--replicas", "2")])
def test_a_second_start_at_an_address_is_refused_before_anything_else(
    replicas: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    command = ["lim", "serve", "no-such-model", "--port", str(port), *replicas]
    monkeypatch.setattr(sys, "argv", command)
    with claimed("127.0.0.1", port), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == REFUSED
    assert capsys.readouterr().err.startswith(f"error: port {port} of 127.0.0.1 is taken by")


def test_an_address_has_one_lim_serve_which_a_second_one_names() -> None:
    port, host = free_port(), "h" * 300
    for each in ("127.0.0.1", host):
        with (
            claimed(each, port),
            claimed("127.0.0.2", port),
            pytest.raises(ConfigError, match=rf"port {port} of .*\(process {os.getpid()}\)"),
            claimed(each, port),
        ):
            pytest.fail("both start there")
    with claimed(host, port):
        pass  # free again at the end of the block


@pytest.mark.parametrize("method", ["bind", "listen", "__init__"])
def test_a_server_starts_where_nothing_can_be_claimed(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "no abstract sockets")

    port, began = free_port(), False
    monkeypatch.setattr(socket.socket, method, refuse)
    with claimed("127.0.0.1", port):
        began = True
    assert began


def test_a_name_that_is_no_unicode_is_claimed_by_a_process_that_may_stay_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, host = free_port(), "host\udcff"
    monkeypatch.delattr(socket, "SO_PEERCRED")
    refused = pytest.raises(ConfigError, match="another lim serve, which starts or runs")
    with claimed(host, port), refused, claimed(host, port):
        pytest.fail("both start there")


def test_a_killed_lim_serve_claims_nothing() -> None:
    port = free_port()
    program = (
        "from lim_sglang.launch.serve import claimed\n"
        f"with claimed('127.0.0.1', {port}): print('claimed', flush=True), input()"
    )
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "claimed\n"
        refused = pytest.raises(ConfigError, match=rf"process {other.pid}\), which starts or runs")
        with refused, claimed("127.0.0.1", port):
            pytest.fail("both start there")
        other.kill()
    with claimed("127.0.0.1", port):
        pass


@pytest.mark.e2e
def test_sglangs_refusal_is_relayed_and_nothing_is_left(tiny_model: Path) -> None:
    """A process that was left behind keeps the inherited pipe open: `TimeoutExpired`."""
    options = ("--enable-mixed-chunk", "--enable-deterministic-inference", "--pp-size", "2")
    process = subprocess.Popen(
        [*LIM_SERVE, "--port", str(free_port()), str(tiny_model), "--", *options],
        env=clean_environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        shown, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        end_tree(process)
    text = shown.decode()
    assert process.returncode == REFUSED
    assert not [words for words in (*options[:2], "--pp-size 2") if words not in text]
    assert text.count("error:") == 1
    assert "Traceback" not in text
