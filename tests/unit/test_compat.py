"""What of SGLang is pinned and mended, without SGLang."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang import compat
from lim_sglang.errors import ServerError


@pytest.mark.parametrize("found", ["0.5.17", None])
def test_another_sglang_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: found)
    with pytest.raises(ServerError, match=rf"0\.5\.16 exactly, found {found or 'none'}"):
        compat.check_version()


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="Nonsense"):
        compat.Nonsense  # noqa: B018 - looking it up is the test


class Manager:
    """Stands in for SGLang's tokenizer manager: it forgets all states but the first."""

    def __init__(self) -> None:
        self.states = {"a", "b", "c"}

    async def handle(self, obj: Any, request: Any = None) -> AsyncIterator[str]:
        """Yield one output, then fail where the request says so."""
        yield "output"
        self.states.discard("a")
        if obj.fails:
            raise ConnectionError

    def _discard_pending_req_states(self, obj: Any) -> None:
        self.states -= set(obj.rid)


async def drain(manager: Manager, obj: Any) -> list[str]:
    """All outputs of one batch through the mended handler."""
    outputs = compat.handle_batch_without_leak(Manager.handle, manager, obj)
    return [output async for output in outputs]


def test_parallel_samples_leave_no_state_behind() -> None:
    manager = Manager()
    obj = SimpleNamespace(parallel_sample_num=3, rid=["a", "b", "c"], fails=False)
    assert asyncio.run(drain(manager, obj)) == ["output"]
    assert manager.states == set()


def test_parallel_samples_that_fail_leave_no_state_behind() -> None:
    manager = Manager()
    obj = SimpleNamespace(parallel_sample_num=3, rid=["a", "b", "c"], fails=True)
    with pytest.raises(ConnectionError):
        asyncio.run(drain(manager, obj))
    assert manager.states == set()


def test_a_plain_batch_keeps_the_states_that_are_still_in_flight() -> None:
    manager = Manager()
    obj = SimpleNamespace(parallel_sample_num=1, rid=["a", "b", "c"], fails=False)
    asyncio.run(drain(manager, obj))
    assert manager.states == {"b", "c"}


@pytest.mark.parametrize(("value", "on_cpu"), [("1", True), ("0", False), (None, False)])
def test_the_environment_says_where_sglang_serves(
    monkeypatch: pytest.MonkeyPatch, value: str | None, on_cpu: bool
) -> None:
    monkeypatch.delenv(compat.CPU_ENGINE_VAR, raising=False)
    if value is not None:
        monkeypatch.setenv(compat.CPU_ENGINE_VAR, value)
    assert compat.serves_on_cpu() is on_cpu
