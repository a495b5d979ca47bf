"""A server for the length of a block: proved when it begins, gone with its children at the end."""

import io
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from rich.console import Console

from lim_sglang import server as server_module
from lim_sglang.errors import DataError, RefusedError, ServerError
from lim_sglang.evals import serving as serving_module
from lim_sglang.evals.serving import ServerSpec, newest_line, serving
from tests.evals.tiny_servers import none_left, running, spec, tiny_options
from tests.evals.tiny_sglang import FINAL_WORDS, NUM_PROCESSES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the processes leave their ids; none of them may be left."""
    monkeypatch.setattr(serving_module, "server_options", tiny_options)
    monkeypatch.setattr(server_module, "GRACE_S", 0.2)
    monkeypatch.setattr(server_module, "POLL_S", 0.02)
    with none_left(tmp_path) as folder:
        yield folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where unwanted logs are kept meanwhile."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_a_block_has_the_address_of_a_server_that_is_ready(folder: Path, temporary: Path) -> None:
    with serving(spec(folder), quiet()) as url:
        assert requests.get(f"{url}/server_info", timeout=5).ok
        assert len(running(folder)) == NUM_PROCESSES
    assert running(folder) == []
    assert list(temporary.iterdir()) == []


def test_an_exception_ends_the_server_and_comes_through(folder: Path, temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), serving(spec(folder), quiet()):
        _ = 1 / 0
    assert running(folder) == []
    assert list(temporary.iterdir()) == []


def test_a_start_that_fails_shows_how_its_log_ends_and_where_it_is(
    folder: Path, temporary: Path
) -> None:
    with (
        pytest.raises(ServerError, match="ended with code 1 before it was ready") as caught,
        serving(spec(folder, "fail"), quiet()),
    ):
        pytest.fail("it was ready")
    assert FINAL_WORDS in str(caught.value)
    [log] = temporary.iterdir()
    assert f"(log: {log})" in str(caught.value)
    assert FINAL_WORDS in log.read_text()


def ask_in_vain(url: str) -> None:
    """As a run does that finds no server any more."""
    while True:
        try:
            requests.get(f"{url}/health", timeout=5)
        except requests.RequestException:
            raise ServerError(f"no server answers at {url}") from None


def test_a_server_that_breaks_down_shows_how_its_log_ends(folder: Path, temporary: Path) -> None:
    with (
        pytest.raises(ServerError, match=f"(?s)no server answers at .*{FINAL_WORDS}"),
        serving(spec(folder, "break"), quiet()) as url,
    ):
        ask_in_vain(url)
    assert len(list(temporary.iterdir())) == 1


def test_a_dense_server_is_no_server(folder: Path) -> None:
    with (
        pytest.raises(ServerError, match="decodes without LessIsMore"),
        serving(spec(folder, "dense"), quiet()),
    ):
        pytest.fail("it was taken for one")


def test_a_log_that_is_wanted_is_kept(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "runs" / "tiny.log"
    with serving(spec(folder), quiet(), log):
        pass
    assert "Loading" in log.read_text()


def test_a_log_that_cannot_be_written_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(DataError, match=r"cannot write a server's log to .*tiny\.log"),
        serving(spec(folder), quiet(), tmp_path / "runs" / "tiny.log"),
    ):
        pytest.fail("it was started")
    assert list(folder.iterdir()) == []


def test_what_lim_serve_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    wrong = ServerSpec("tiny", {"--lim-budget": "many"}, ("--attention-backend", "fa3"))
    with pytest.raises(RefusedError) as caught, serving(wrong, quiet()):
        pytest.fail("it was started")
    assert len(caught.value.reasons) == 2


def test_afterwards_signals_are_handled_as_before(folder: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with serving(spec(folder), quiet()):
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_thread_may_have_a_server_too(folder: Path) -> None:
    urls = []

    def serve() -> None:
        with serving(spec(folder), quiet()) as url:
            urls.append(url)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(30)
    assert len(urls) == 1


def test_a_start_is_told_once_in_a_file_and_followed_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "SHOWN_S", 0.02)
    shown = io.StringIO()
    with serving(spec(folder), Console(file=shown, width=80)):
        pass
    said = r"Starting a server: tiny --lim-budget 64\nThe server is ready after \d+ s\n"
    assert re.fullmatch(said, shown.getvalue())
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.setattr(server_module, "POLL_S", 0.5)
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True)
    with serving(spec(folder), terminal):
        pass
    # What looks like markup in the log is shown as it is.
    assert "Loading [/bold] 100%" in terminal.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (b"", ""),
        (b"\n \n", ""),
        (b"first\nsecond", "second"),
        (b"first\nsecond\n\n", "second"),
        (b"Loading: 10%\rLoading: 20%\r", "Loading: 20%"),
        (b"\x1b[31mred\x1b[0m [bold]\n", "red [bold]"),
        (
            b"\xff" + b"x" * 3000 + b"\nlast \xc3\xa4\n",
            "last \N{LATIN SMALL LETTER A WITH DIAERESIS}",
        ),
    ],
)
def test_the_newest_line_of_a_log(log: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_bytes(log)
    assert newest_line(path) == line
