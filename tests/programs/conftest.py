"""Fixtures of the tests of programs."""

import pytest

from lim_sglang.programs import backend
from lim_sglang.programs.http_client import Backoff


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BACKOFF", Backoff(tries=3, first_s=0.01))
