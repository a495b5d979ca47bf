"""A real server of which any process is killed: all others end, and no file is left."""

import shlex
import time
from pathlib import Path
from signal import SIGINT

import httpx
import psutil
import pytest

from lim_sglang.launch.supervisor import ServerFolder
from tests.processes import LIM_SERVE, LocalServer, serving, still_running
from tests.server.tiny_model import random_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

GONE_WITHIN_S = 10.0
IDLE_S = 30.0
MAX_IDLE_PERCENT = 5.0
NAMES = {
    "lim": "-m lim_sglang serve",
    "supervisor": "-m lim_sglang.launch.supervisor",
    "main": "-m sglang.launch_server",
    "scheduler": "sglang::scheduler",
    "detokenizer": "sglang::detokenizer",
    "resource tracker": "multiprocessing.resource_tracker",
}
"""What the command line of each process has in it; the first that fits is its name."""


def members(server: LocalServer) -> dict[str, psutil.Process]:
    """Return the processes of `lim serve` by name."""
    lines = {process: " ".join(process.cmdline()) for process in server.tree()}
    names = {
        process: next(name for name, words in NAMES.items() if words in line)
        for process, line in lines.items()
    }
    assert sorted(names.values()) == sorted(NAMES)
    return {name: process for process, name in names.items()}


@pytest.mark.parametrize(
    "victims",
    [*([name] for name in NAMES), ["lim", "supervisor"], ["detokenizer", "scheduler"], list(NAMES)],
    ids=" and ".join,
)
def test_nothing_is_left_behind(
    victims: list[str], tiny_model: Path, tmp_path: Path, temporary: Path
) -> None:
    command = [*LIM_SERVE, str(tiny_model), "--lim-select-layers", "2,5"]
    with serving(command, folder=tmp_path, settings={"TMPDIR": str(temporary)}) as server:
        processes = members(server)
        [folder] = temporary.iterdir()
        for victim in victims:
            processes[victim].kill()
        assert not still_running(list(processes.values()), GONE_WITHIN_S)
    if {"lim", "supervisor"} <= set(victims):  # the next start removes what nobody could
        ServerFolder.make().remove()
    assert list(temporary.iterdir()) == []
    assert not list(Path("/dev/shm").glob(f"*{folder.name}*"))


@pytest.mark.parametrize("victim", ["TP0", "TP1"])
def test_a_killed_rank_ends_the_server(
    victim: str, tiny_model: Path, tmp_path: Path, temporary: Path
) -> None:
    """In the middle of a decode step, in which the other rank waits for it."""
    words = shlex.join([*LIM_SERVE, str(tiny_model), "--lim-select-layers", "2,5"])
    command = ["sh", "-c", f'exec {words} "$@" -- --tp-size 2', "sh"]  # the port comes before --
    body = {
        "input_ids": random_prompt(300, 1),
        "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True},
        "stream": True,
    }
    with serving(command, folder=tmp_path, settings={"TMPDIR": str(temporary)}) as server:
        lines = {process: " ".join(process.cmdline()) for process in server.tree()}
        [rank] = [each for each, line in lines.items() if f"scheduler_{victim}" in line]
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as stream:
            next(stream.iter_lines())
            rank.kill()
            assert not still_running(list(lines), GONE_WITHIN_S)
    log = (tmp_path / "server.log").read_text()
    assert f"SGLang's scheduler_{victim} (process {rank.pid}) " in log
    assert list(temporary.iterdir()) == []


def test_an_idle_server_leaves_the_cores_alone(
    tiny_model: Path, tmp_path: Path, temporary: Path
) -> None:
    command = [*LIM_SERVE, str(tiny_model), "--lim-select-layers", "2,5"]
    with serving(command, folder=tmp_path, settings={"TMPDIR": str(temporary)}) as server:
        tree = server.tree()
        time.sleep(5)  # the end of the start
        before = sum(sum(process.cpu_times()[:2]) for process in tree)
        time.sleep(IDLE_S)
        used_s = sum(sum(process.cpu_times()[:2]) for process in tree) - before
        assert not server.end_by(SIGINT, GONE_WITHIN_S).left
    assert 100 * used_s / IDLE_S < MAX_IDLE_PERCENT
