"""`lim serve` as a real process that must not serve: it says why and leaves nothing behind."""

import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lim_sglang.server import free_port
from tests.conftest import DenseServer
from tests.processes import LIM_SERVE, clean_environment, end_tree

pytestmark = pytest.mark.e2e

FAILED, REFUSED = 1, 2
"""Exit codes: a start that failed, and one that was refused, by whichever process."""
TIMEOUT_S = 120


@dataclass(frozen=True)
class Ended:
    """A `lim serve` that ended by itself."""

    code: int
    shown: str
    """Standard output and error."""

    def lacks(self, *words: str) -> list[str]:
        """Words that it should have shown and did not; a traceback counts as one more."""
        lacking = [word for word in words if word not in self.shown]
        return lacking + ["no traceback"] * ("Traceback" in self.shown)


def start(
    *arguments: str, port: int | None = None, settings: Mapping[str, str] | None = None
) -> Ended:
    """Run `lim serve` to its end and to that of all that it started.

    Every process of its tree inherits the pipe, which is read until the last one has closed it: a
    server that was left behind is a `TimeoutExpired`.
    """
    process = subprocess.Popen(
        [*LIM_SERVE, "--port", str(port or free_port()), *arguments],
        env=clean_environment(settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        shown, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        end_tree(process)
    return Ended(process.returncode, shown.decode())


def test_three_options_are_named_in_one_message(tiny_model: Path) -> None:
    options = ("--enable-mixed-chunk", "--enable-deterministic-inference", "--pp-size", "2")
    ended = start(str(tiny_model), "--", *options)
    assert ended.code == REFUSED
    assert not ended.lacks(*options[:2], "--pp-size 2")
    assert ended.shown.count("error:") == 1


@pytest.mark.parametrize(
    ("variable", "value"), [("SGLANG_PLUGINS", "none"), ("SGLANG_PLATFORM", "x")]
)
def test_an_environment_that_disables_the_plugin_is_refused(
    tiny_model: Path, variable: str, value: str
) -> None:
    ended = start(str(tiny_model), settings={variable: value})
    assert ended.code == REFUSED
    assert not ended.lacks(f"{variable}={value}", "unset it")


def test_a_port_in_use_is_refused_and_named(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = start(str(tiny_model), port=port)
    assert ended.code == REFUSED
    assert not ended.lacks(f"port {port} of 127.0.0.1 is in use")


def test_a_model_that_is_neither_a_folder_nor_a_hub_id_is_refused() -> None:
    ended = start("no-such-model")
    assert ended.code == FAILED
    assert not ended.lacks("'no-such-model'", "hub id")


def test_a_live_server_without_the_plugin_is_not_taken_for_ours(dense: DenseServer) -> None:
    assert "decodes without LessIsMore" in dense.verdict


def test_help_names_the_dials() -> None:
    ended = start("--help")
    assert ended.code == 0
    assert not ended.lacks("--budget", "--policy", "--lim-select-layers", "--host", "--api-key")
