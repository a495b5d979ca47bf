"""What of SGLang is mended and looked up, without SGLang."""

import asyncio
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lim_sglang import compat


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


def test_the_context_is_the_option_or_what_sglang_derives(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SimpleNamespace(get_context_length=lambda config: config.max_position_embeddings)
    monkeypatch.setattr(compat.importlib, "import_module", lambda _name: reader)
    model = SimpleNamespace(max_position_embeddings=4096)
    assert compat.context_length(SimpleNamespace(context_length=None), model) == 4096
    assert compat.context_length(SimpleNamespace(context_length=512), model) == 512


def test_extra_context_is_what_sglang_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizing = SimpleNamespace(get_req_to_token_extra_context_len=lambda args: 4 + args.drafts)
    monkeypatch.setattr(compat.importlib, "import_module", lambda _name: sizing)
    assert compat.extra_context(SimpleNamespace(drafts=3)) == 7


@pytest.mark.parametrize(
    ("chosen", "wanted", "meanwhile"),
    [(None, True, "true"), (None, False, None), ("false", True, "false"), ("true", False, "true")],
)
def test_dense_decode_is_on_tensor_cores_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, wanted: bool, meanwhile: str | None
) -> None:
    monkeypatch.delenv(compat.TENSOR_CORE_VAR, raising=False)
    if chosen is not None:
        monkeypatch.setenv(compat.TENSOR_CORE_VAR, chosen)
    seen = []

    def make_backend() -> None:
        with compat.decode_on_tensor_cores(wanted=wanted):
            seen.append(os.environ.get(compat.TENSOR_CORE_VAR))
            raise KeyError  # whatever becomes of it

    with pytest.raises(KeyError):
        make_backend()
    assert [*seen, os.environ.get(compat.TENSOR_CORE_VAR)] == [meanwhile, chosen]
