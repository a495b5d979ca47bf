"""A server's options, start, proof of life, log and end, with fake SGLang processes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from lim_sglang.errors import DataError, RefusedError, ServerError
from lim_sglang.launch import server as server_module
from lim_sglang.launch import server_log
from lim_sglang.launch.server import (
    Server,
    ServerOptions,
    ServerSpec,
    free_port,
    reasons_against_start,
    server_options,
    serving,
)
from tests.fakes.http import JsonHandler, served
from tests.fakes.sglang_process import LAST_WORDS, NUM_PROCESSES
from tests.fakes.sglang_server import eventually
from tests.server.fake_servers import (
    fake_options,
    fake_server,
    fake_spec,
    running,
    wait_until_begun,
)

ROOT = Path(__file__).parents[2]


def quiet() -> Console:
    """Return a console that nobody sees."""
    return Console(file=io.StringIO(), width=80)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "flashinfer"}, "--attention-backend flashinfer"),
        ({"api_key": "secret"}, "--attention-backend lim --api-key secret"),
        (
            {"lim_flags": ("--lim-budget=9",), "sglang_options": ("--dtype", "bfloat16")},
            "--lim-budget=9 --dtype bfloat16",
        ),
    ],
)
def test_options_come_last_those_of_the_user_after_ours(
    options: dict[str, Any], words: str
) -> None:
    command = ServerOptions("model", **options).command_line()
    assert " ".join(command).endswith(f" {words}")
    assert "float32" in command  # where the user may overrule it


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:5"),
        ("0.0.0.0", "http://127.0.0.1:5"),
        ("", "http://127.0.0.1:5"),
        ("::", "http://[::1]:5"),
    ],
)
def test_a_client_on_this_machine_has_an_address(host: str, url: str) -> None:
    assert ServerOptions("model", host=host, port=5).url == url


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ((), {"SGLANG_PLUGINS": "other, lim"}, None),
        (("--prefill-attention-backend", "fa3"), {}, None),
        (("--attention-backend", "fa3", "--decode-attention-backend", "lim"), {}, None),
        ((), {"SGLANG_PLUGINS": "none"}, "SGLANG_PLUGINS=none"),
        ((), {"SGLANG_PLATFORM": "lim"}, "SGLANG_PLATFORM=lim"),
        (("--attention-backend", "triton"), {}, "served by triton"),
        (("--decode-attention-backend=fa3",), {}, "served by fa3"),
    ],
)
def test_a_start_without_the_plugin_is_refused(
    options: tuple[str, ...], environment: dict[str, str], words: str | None
) -> None:
    reasons = reasons_against_start("127.0.0.1", free_port(), options, environment)
    assert len(reasons) == (words is not None)
    assert all(words in reason for reason in reasons if words)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--tp-size 1 --kv-cache-dtype fp8_e4m3 --trust-remote-code", None),
        ("--tp 2", None),
        ("--log-level info --pipeline-parallel-size=8", "--pp-size 8: a set cannot"),
        ("--pp 3 --tp two", "--pp-size 3: a set cannot"),  # SGLang refuses the word itself
        ("--enable-mixed-chunk", "--enable-mixed-chunk: decode tokens"),
        ("--enable-mis --schedule-policy fcfs", "--enable-mis: it needs"),
        ("--kv-cache-dtype int4", "--kv-cache-dtype int4: keys are"),
        ("--disaggregation-mode null", None),
        ("--grammar-backend xgrammar", "--grammar-backend xgrammar: it does not mask"),
    ],
)
def test_refused_options_are_told_before_anything_starts(
    words: str, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "check_model", lambda model, _: model)
    monkeypatch.setattr(server_module, "has_gpu", lambda: False)
    spec = ServerSpec("tiny", {}, tuple(words.split()))
    with pytest.raises(RefusedError, match=re.escape(refused)) if refused else nullcontext():
        server_options(spec, port=free_port())


@pytest.mark.parametrize("words", ["--tp 2", "--log-level info --tensor-parallel-size=2"])
def test_ranks_are_refused_on_a_gpu_before_anything_starts(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "has_gpu", lambda: True)
    with pytest.raises(RefusedError, match=r"--tp-size 2: .* on several GPUs"):
        server_options(ServerSpec("tiny", {}, tuple(words.split())), port=free_port())


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--tp 2", "--tp-size 2: policy lossless drafts and verifies on one rank"),
        ("--kv-cache-dtype fp8_e4m3", "--kv-cache-dtype fp8_e4m3: it has not been verified with"),
        ("--sampling-backend pytorch", "--sampling-backend pytorch: drafts and verification"),
        ("--enable-lora", "--enable-lora: it has not been verified with policy lossless"),
        ("--sampling-backend lim --kv-cache-dtype auto --tp 1", None),
    ],
)
def test_what_drafts_cannot_be_served_with_is_told_before_anything_starts(
    words: str, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    monkeypatch.setattr(server_module, "check_model", lambda model, _: model)
    monkeypatch.setattr(server_module, "has_gpu", lambda: False)
    for policy, is_refused in (("lossless", bool(refused)), ("lessismore", False)):
        spec = ServerSpec("tiny", {"--lim-policy": policy}, tuple(words.split()))
        with pytest.raises(RefusedError, match=refused) if is_refused else nullcontext():
            server_options(spec, port=free_port())


LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 1024}


def write_config(folder: Path, **more: Any) -> None:
    """Write the configuration of a model of 30 layers."""
    config = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, **more}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 30}))


@pytest.mark.parametrize(
    ("flags", "words", "refused"),
    [
        ({"--lim-select-layers": "2,99"}, (), "select_layers names layer 99.* 0 to 29"),
        ({"--lim-config": '{"dense_layers": [30]}'}, (), "dense_layers names layer 30"),
        ({"--lim-select-layers": "2,29"}, (), None),
        ({"--lim-select-layers": "2,99"}, ("--lim-select-layers", "2"), None),
        ({"--lim-select-layers": "30"}, ("--json-model-override-args", "{}"), None),
    ],
)
def test_layers_that_the_model_lacks_are_refused_before_anything_starts(
    flags: dict[str, str],
    words: tuple[str, ...],
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    monkeypatch.setattr(server_module, "has_gpu", lambda: False)
    write_config(tmp_path)
    with pytest.raises(RefusedError, match=refused) if refused else nullcontext():
        server_options(ServerSpec(str(tmp_path), flags, words), port=free_port())


@pytest.mark.parametrize(
    ("max_tokens", "more", "words", "is_refused"),
    [
        (8192, {}, "", True),
        (8191, {}, "", False),
        (8191, {}, "--context-length 4096", True),
        (8192, {}, "--context-length 16384", False),
        (8192, {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, "", True),
        (8192, {"rope_scaling": {"factor": 8.0, **LLAMA3}}, "", True),
        (99_999, {"rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}, "", False),
        (99_999, {}, "--json-model-override-args {}", False),
        (None, {}, "", False),
    ],
)
def test_more_tokens_than_the_model_takes_are_refused_before_anything_starts(
    max_tokens: int | None,
    more: dict[str, Any],
    words: str,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    monkeypatch.setattr(server_module, "has_gpu", lambda: False)
    write_config(tmp_path, max_position_embeddings=8192, **more)
    spec = ServerSpec(str(tmp_path), {}, tuple(words.split()), max_tokens=max_tokens)
    context = pytest.raises(RefusedError, match=r"--max-tokens \d,\d{3}: the model takes")
    with context if is_refused else nullcontext():
        server_options(spec, port=free_port())


@pytest.mark.parametrize(
    ("heads", "model", "refused"),
    [
        (9, "here", None),
        (3, "here", "was measured on own .* and 3 heads.*, but the model is .* and 9 heads"),
        (None, "here", "is damaged"),
        (3, "elsewhere", None),  # its shape is not known before the start
        (None, "elsewhere", "is damaged"),
    ],
)
def test_a_preset_that_is_not_the_models_is_refused_before_anything_starts(
    heads: int | None,
    model: str,
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    monkeypatch.setattr(server_module, "has_gpu", lambda: False)
    monkeypatch.setattr(server_module, "check_model", lambda model, _: model)
    write_config(tmp_path)
    shape = {"model_type": "llama", "num_layers": 30, "hidden_size": 576, "num_heads": heads}
    unknown = dict.fromkeys(("vocab_size", "rope_theta", "fingerprint"))
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps({"shape": shape, "layers": [2], "model": "own", **unknown}))
    flags = {"--lim-preset": str(preset)}
    source = str(tmp_path) if model == "here" else "some/model"
    with pytest.raises(RefusedError, match=refused) if refused else nullcontext():
        server_options(ServerSpec(source, flags), port=free_port())


def test_all_reasons_against_a_start_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    monkeypatch.setenv("SGLANG_PLUGINS", "x")
    words = ("--attention-backend", "fa3", "--port", "8", "--ssl-keyfile=k", "--tp-sise", "2")
    with pytest.raises(RefusedError) as caught:
        server_options(ServerSpec("tiny", {"--lim-budget": "many"}, words, ""), port=free_port())
    expected = [
        "--port after --",
        "--ssl-keyfile after --",
        "--tp-sise after --: SGLang 0.5.16 has no such option; do you mean --tp-size?",
        "SGLANG_PLUGINS",
        "fa3",
        "--lim-budget",
    ]
    assert len(caught.value.reasons) == len(expected) + 1
    for start, reason in zip([*expected, "API key"], caught.value.reasons, strict=True):
        assert start in reason


@pytest.mark.parametrize(
    ("device", "has_gpu", "on_cpu"),
    [
        ((), False, True),
        ((), True, False),
        (("--device", "cpu"), True, True),
        (("--device=cpu",), True, True),
        (("--device", "cuda"), True, False),
    ],
)
def test_the_device_is_the_users_else_what_is_there(
    monkeypatch: pytest.MonkeyPatch, device: tuple[str, ...], has_gpu: bool, on_cpu: bool
) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    monkeypatch.setattr(server_module, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr(server_module, "check_model", lambda model, _: model)
    spec = ServerSpec("some/model", {"--lim-select-layers": ""}, device)
    options = server_options(spec, port=free_port())
    assert (options.model, options.on_cpu) == ("some/model", on_cpu)
    assert options.lim_flags == ("--lim-select-layers=",)
    assert ("float32" in options.command_line()) is on_cpu
    assert ("SGLANG_USE_CPU_ENGINE" in options.environment()) is on_cpu
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert options.environment().get("OMP_WAIT_POLICY") == ("PASSIVE" if on_cpu else None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert options.environment()["OMP_WAIT_POLICY"] == "ACTIVE"


@contextmanager
def answering(info: dict[str, Any], keys: list[str | None] | None = None) -> Iterator[int]:
    """Answer every request with this `/server_info`; yield the port, note the clients' keys."""

    class Handler(JsonHandler):
        def answer(self, _body: dict[str, Any]) -> None:
            if keys is not None:
                keys.append(self.headers["Authorization"])
            self.send_json(200, info)

    with served(Handler) as url:
        yield int(url.rpartition(":")[2])


def test_a_live_server_shows_its_state_to_who_has_the_key() -> None:
    keys: list[str | None] = []
    with answering({"internal_states": [{"lim": {"roles": ["full"]}}]}, keys) as port:
        server = Server(ServerOptions("model", port=port, api_key="secret"))
        assert server.wait_until_ready() == {"roles": ["full"]}
    assert set(keys) == {"Bearer secret"}


@pytest.mark.parametrize(
    ("asked", "info", "words"),
    [
        ("flashinfer", {"attention_backend": "flashinfer"}, None),
        ("lim", {}, r"without LessIsMore.*lim doctor"),
        ("flashinfer", {"attention_backend": "triton"}, "by triton, asked for was flashinfer"),
        (
            "flashinfer",
            {"attention_backend": "flashinfer", "decode_attention_backend": "fa3"},
            "decodes by fa3",
        ),
        ("lim", {"internal_states": [{"lim": {"ranks": 3, "live_ranks": 2}}]}, "2 of 3 ranks"),
        (
            "flashinfer",
            {"attention_backend": "flashinfer", "internal_states": [{"lim": {"roles": []}}]},
            "decodes by lim",
        ),
    ],
)
def test_another_backend_than_the_one_that_was_asked_for_is_an_error(
    asked: str, info: dict[str, Any], words: str | None
) -> None:
    refused = pytest.raises(ServerError, match=words) if words else nullcontext()
    with answering(info) as port, refused:
        server = Server(ServerOptions("model", port=port, backend=asked))
        assert server.wait_until_ready() == {}


def test_a_server_of_another_backend_is_ended(folder: Path) -> None:
    server = Server(fake_options(fake_spec(folder, "dense"), port=free_port()))
    server.start()
    with pytest.raises(ServerError, match="without LessIsMore"):
        server.wait_until_ready()
    server.stop()


@pytest.mark.parametrize(
    ("manner", "timeout_s", "words"), [("fail", 60, "code 1"), ("hang", 0.1, "not ready after")]
)
def test_a_server_that_dies_or_never_answers_is_given_up(
    folder: Path, manner: str, timeout_s: float, words: str
) -> None:
    server = fake_server(folder, manner)
    with pytest.raises(ServerError, match=words) as caught:
        server.wait_until_ready(timeout_s=timeout_s)
    ending = getattr(caught.value, "ending", None)
    assert (ending and ending.code) == (1 if manner == "fail" else None)
    server.stop()


@pytest.mark.parametrize("manner", ["serve", "fail"])
def test_a_stubborn_tree_is_gone_also_where_its_parent_died_before(
    folder: Path, manner: str
) -> None:
    server = fake_server(folder, manner)
    if manner == "fail":
        assert eventually(lambda: server.poll() is not None, 10)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 10
    assert eventually(lambda: not running(folder), 2)


def test_a_signal_that_comes_while_it_ends_is_heeded_afterwards(folder: Path) -> None:
    server = fake_server(folder, "serve")
    ended: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(not running(folder)))
    try:
        soon = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        soon.start()
        server.stop()
        soon.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [True]  # once, and when nothing ran any more


def test_a_block_has_the_address_of_a_server_that_is_ready(folder: Path, temporary: Path) -> None:
    with serving(fake_spec(folder), quiet()) as url:
        assert httpx.get(f"{url}/server_info", timeout=5).is_success
        assert len(running(folder)) == NUM_PROCESSES
        [own] = temporary.iterdir()
        assert len(list(own.iterdir())) == NUM_PROCESSES + 1  # and the log
    assert running(folder) == []
    assert list(temporary.iterdir()) == []


def test_an_exception_ends_the_server_and_comes_through(folder: Path, temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), serving(fake_spec(folder), quiet()):
        _ = 1 / 0
    assert running(folder) == []
    assert list(temporary.iterdir()) == []


def test_the_server_of_another_on_the_same_port_is_not_taken_for_ours(folder: Path) -> None:
    strangers = {"internal_states": [{"lim": {"roles": ["full"]}, "lim_server": "another"}]}
    with answering(strangers) as port:
        server = Server(fake_options(fake_spec(folder, "hang"), port=port))
        server.start()
        wait_until_begun(folder)
        with pytest.raises(ServerError, match=f"another server answers at .*:{port}"):
            server.wait_until_ready()
        server.stop()


def test_something_else_on_the_port_ends_the_start(folder: Path) -> None:
    class Stranger(JsonHandler):
        def answer(self, _body: dict[str, Any]) -> None:
            self.send_json(404, {})

    with served(Stranger) as url:
        server = Server(fake_options(fake_spec(folder, "hang"), port=int(url.rpartition(":")[2])))
        server.start()
        wait_until_begun(folder)
        with pytest.raises(ServerError, match="another server answers"):
            server.wait_until_ready()
        server.stop()


def ask_until_it_is_gone(url: str) -> None:
    """Ask as a run does, which raises when no server answers any more."""
    while True:
        try:
            httpx.get(f"{url}/health", timeout=5)
        except httpx.HTTPError:
            raise ServerError(f"no server answers at {url}") from None


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("fail", f"(?s)ended with code 1 before it was ready.*\n{LAST_WORDS}$"),
        ("break", f"(?s)no server answers at .*: the server ended with code 9.*{LAST_WORDS}$"),
    ],
)
def test_a_server_that_fails_says_why_and_where_its_log_is(
    folder: Path, tmp_path: Path, manner: str, words: str
) -> None:
    with (
        pytest.raises(ServerError, match=words) as caught,
        serving(fake_spec(folder, manner), quiet()) as url,
    ):
        ask_until_it_is_gone(url)
    [log] = (tmp_path / "cache" / "logs").iterdir()
    assert f"(log: {log})" in str(caught.value)
    assert LAST_WORDS in log.read_text()


def test_a_log_that_cannot_be_written_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(DataError, match=r"cannot write a server's log to .*tiny\.log"),
        serving(fake_spec(folder), quiet(), tmp_path / "runs" / "tiny.log"),
    ):
        pytest.fail("the server was started")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_markup_in_a_log_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    for name in ("FIRST_LINE_S", "LINE_INTERVAL_S", "POLL_S"):
        monkeypatch.setattr(server_log, name, 0.02)
    shown, log = io.StringIO(), tmp_path / "server.log"
    log.write_text("Loading [/bold] 100%\n")
    deadline = time.monotonic() + 10
    console = Console(file=shown, width=80, force_terminal=terminal)
    with server_log.start_shown("tiny", {"": log}, console):
        while "Loading [/bold] 100%" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "Loading [/bold] 100%" in shown.getvalue()


def test_a_start_is_told_now_and_then_in_a_file_and_followed_on_a_terminal_and_in_a_log(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_log, "POLL_S", 0.02)
    monkeypatch.setattr(server_log, "LINE_INTERVAL_S", 0.1)
    monkeypatch.setattr(server_log, "FIRST_LINE_S", 0.1)
    monkeypatch.setattr(server_module, "POLL_S", 0.5)
    shown, log = io.StringIO(), tmp_path / "runs" / "tiny.log"
    with serving(fake_spec(folder), Console(file=shown, width=80), log):
        pass
    assert "Loading" in log.read_text()
    said = (
        rf"SGLang's log: {log}\nStarting a server: tiny --lim-budget 64 "
        r"\(usually 30 to 120 s on a CPU\)\n(  \d+ s \S.*\n)+"
        r"The server is ready after \d+ s\n"
    )
    assert re.fullmatch(said, shown.getvalue())
    for path in folder.iterdir():
        path.unlink()
    terminal = io.StringIO()
    with serving(fake_spec(folder), Console(file=terminal, width=80, force_terminal=True)):
        pass
    assert "Starting a server: tiny" in terminal.getvalue()


def test_a_thread_may_have_a_server_and_signals_are_handled_as_before_afterwards(
    folder: Path,
) -> None:
    before = [signal.getsignal(number) for number in server_module.STOPPING]
    urls = []

    def serve() -> None:
        with serving(fake_spec(folder), quiet()) as url:
            urls.append(url)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(30)
    assert len(urls) == 1
    for path in folder.iterdir():
        path.unlink()
    with serving(fake_spec(folder), quiet()):
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert [signal.getsignal(number) for number in server_module.STOPPING] == before


IN_PROCESS = """
import sys, time
from pathlib import Path
from rich.console import Console
from lim_sglang.launch import server
from tests.server.fake_servers import fake_options, fake_spec

server.GRACE_S = float(sys.argv[3])
server.server_options = fake_options
try:
    with server.serving(fake_spec(Path(sys.argv[1]), sys.argv[2]), Console()):
        print("inside", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def start(folder: Path, manner: str, grace_s: float = 0.2) -> subprocess.Popen[str]:
    """Start a process that has a server; wait until the server serves, or begins if it hangs."""
    process = subprocess.Popen(
        [sys.executable, "-c", IN_PROCESS, str(folder), manner, str(grace_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until_begun(folder)
    assert process.stdout
    while manner == "serve" and "inside" not in process.stdout.readline():
        assert process.poll() is None
    return process


@pytest.mark.parametrize(
    ("number", "manner"),
    [
        (signal.SIGINT, "serve"),
        (signal.SIGTERM, "serve"),
        (signal.SIGHUP, "serve"),
        (signal.SIGTERM, "hang"),
    ],
)
def test_a_signal_ends_the_server_while_it_starts_and_while_it_serves(
    number: int, manner: str, folder: Path
) -> None:
    process = start(folder, manner)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert output.endswith("interrupted\n")
    assert running(folder) == []


def test_repeated_signals_leave_no_server_behind(folder: Path) -> None:
    process = start(folder, "serve", grace_s=1.0)
    process.send_signal(signal.SIGINT)
    for _ in range(20):  # while it waits for processes that ignore SIGTERM
        time.sleep(0.04)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert running(folder) == []


def test_under_nohup_a_closed_terminal_is_no_end(folder: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(folder, "serve")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    assert not eventually(lambda: process.poll() is not None, 1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert running(folder) == []
