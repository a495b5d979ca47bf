"""Loading SGLang's frontend takes ten seconds: all commands of these tests share a loaded one."""

from collections.abc import Iterator

import pytest

from tests.programs.forking import Forker, forking


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Runs commands as processes of their own."""
    with forking() as forker:
        yield forker
